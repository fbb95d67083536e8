"""Keyed sampling: the right distribution, the same whatever is sampled beside it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megapref.inference.sampling import Sampling, filter_logits, keys, sample, uniforms


def test_samples_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    n = 40_000
    ids = sample(logits.expand(n, -1), uniforms(keys(7, np.arange(n)), np.zeros(n, np.int64)), Sampling(temperature=0.7))
    observed = torch.bincount(ids, minlength=5).double()
    expected = (logits.double() / 0.7).softmax(0) * n
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    assert chi_square < 18.5  # 99.9 % quantile with 4 degrees of freedom


def test_uniforms_are_uniform_over_positions_and_requests():
    u = uniforms(keys(0, np.arange(100))[:, None], np.arange(200)[None]).ravel()
    assert u.min() >= 0 and u.max() < 1 and len(np.unique(u)) == u.size
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 45.3  # 99.9 % with 19
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03


@given(st.integers(0, 2**40), st.integers(0, 10_000), st.integers(0, 1))
def test_every_part_of_a_key_matters(step, index, side):
    key = int(keys(3, step, index, side))
    assert key not in {int(keys(4, step, index, side)), int(keys(3, step + 1, index, side)), int(keys(3, step, index + 1, side))}
    assert key != int(keys(3, step, index, 1 - side))


def test_a_sample_does_not_depend_on_its_batch():
    logits = torch.randn(16, 50)
    key, positions = keys(1, 2, np.arange(16), 0), np.arange(16)
    together = sample(logits, uniforms(key, positions), Sampling())
    alone = torch.cat([sample(logits[i : i + 1], uniforms(key[i : i + 1], positions[i : i + 1]), Sampling()) for i in range(16)])
    assert together.tolist() == alone.tolist()


def test_top_k_and_top_p_keep_what_they_say():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    kept = lambda **options: torch.isfinite(filter_logits(logits, Sampling(**options)))[0].tolist()  # noqa: E731
    assert kept(top_k=1) == [True, False, False, False]
    assert kept(top_p=0.6) == [True, True, False, False]
    assert kept(top_p=0.01) == [True, False, False, False]
    assert kept(top_k=1, top_p=0.95) == [True, False, False, False]
    assert kept() == [True] * 4


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_give_possible_tokens(uniform):
    logits = torch.tensor([[float("-inf"), 1.0, 2.0, float("-inf")]])
    assert sample(logits, np.array([uniform]), Sampling()).item() in (1, 2)


def test_temperature_zero_is_greedy():
    assert sample(torch.tensor([[0.0, 3.0, 1.0]]), np.array([0.999]), Sampling(temperature=0)).item() == 1
