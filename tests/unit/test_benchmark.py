"""The pure parts of tools/benchmark.py: its clock, its synthetic pairs, and that the bare step computes DPO."""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import benchmark
from benchmark_floor import bare_dpo_step, completion_logps, lay_out
from benchmark_generation import share_of_step, transformers_round, wanted
from benchmark_inputs import make_model, synthetic_pairs

from megapref.batch import TokenPair


def test_clock_counts_nested_work_once(monkeypatch):
    ticks = iter(np.array([[10.0, 1.0], [13.0, 2.0]]))
    monkeypatch.setattr(benchmark, "now", lambda: next(ticks))
    clock = benchmark.Clock()
    inner = clock.timed("inner", lambda x: x + 1)
    assert clock.timed("outer", lambda x: inner(x) * 2)(3) == 8
    assert list(clock.spent) == ["outer"] and clock.spent["outer"].tolist() == [3.0, 1.0]


def test_rates_are_per_second_and_per_cpu_second():
    rates = benchmark.rates(np.array([4.0, 2.0]), 8, 100.0)
    assert (rates["items_per_s"], rates["tokens_per_s"], rates["items_per_cpu_s"], rates["tokens_per_cpu_s"]) == (2.0, 25.0, 4.0, 50.0)


def test_synthetic_pairs_are_seeded_and_skewed():
    pairs = synthetic_pairs(400, 100, seed=1)
    assert pairs == synthetic_pairs(400, 100, seed=1) != synthetic_pairs(400, 100, seed=2)
    sizes = np.array([[len(pair.prompt_ids), len(pair.first_ids), len(pair.second_ids)] for pair in pairs])
    assert (sizes >= [12, 20, 20]).all() and (sizes <= [400, 300, 300]).all()
    assert np.corrcoef(sizes[:, 1], sizes[:, 2])[0, 1] > 0.15
    assert (sizes.mean(0) > np.median(sizes, 0)).all()


@pytest.mark.parametrize("text", ["6", "0x64", "2x100", "ax64"])
def test_bad_shapes_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="multiple of 64"):
        benchmark.shape(text)


def test_bare_step_is_dpo(tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    folder = make_model(tmp_path, 2, 64)
    pairs = [TokenPair([5, 6, 7], [8, 9], [10, 11, 12, 13]), TokenPair([20], [21, 22, 23], [24])]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = []
    for pair in pairs:
        for ids in (pair.first_ids, pair.second_ids):
            logps = model(torch.tensor([[*pair.prompt_ids, *ids]])).logits[0, len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
            expected.append(logps[range(len(ids)), ids].sum())
    torch.testing.assert_close(completion_logps(model, lay_out(pairs), 2), torch.stack(expected).view(2, 2), atol=1e-5, rtol=1e-5)
    step = bare_dpo_step(folder, lr=1e-2, beta=0.1, clip_grad=1.0)
    losses = [step(pairs)[0] for _ in range(3)]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6)
    assert losses[2] < losses[1] < losses[0]


def test_transformers_rows_end_at_their_own_lengths(tmp_path):
    """In batches, padded on the left, they are what each request gives alone."""
    torch.manual_seed(0)
    folder = make_model(tmp_path, 2, 64)
    requests = wanted([TokenPair([5, 6, 7], [0] * 2, [0] * 9), TokenPair([20] * 8, [0] * 4, [0])], longest=5)
    assert [limit for _, limit in requests] == [2, 5, 4, 1]
    together = transformers_round(folder, requests, slots=3)(0, 0.0)
    assert [len(ids) for ids in together] == [2, 5, 4, 1]
    assert together == [transformers_round(folder, [request], slots=1)(0, 0.0)[0] for request in requests]


def test_share_of_sampling_in_a_step():
    share = share_of_step({"items_per_s": 2.0, "items_per_cpu_s": 1.0}, {"items_per_s": 4.0, "items_per_cpu_s": 1.0})
    assert share == pytest.approx({"items_per_s": 0.5, "items_per_cpu_s": 2 / 3})
