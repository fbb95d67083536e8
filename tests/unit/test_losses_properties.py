"""What holds for every loss: order and packing do not matter, sides are symmetric, gradients are right, finite, and there without pairs."""

import inspect
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_losses import DIVERGENCES, OF_Z, OTHERS, B, make_pairs, subset, with_policy

from megapref import losses

SYMMETRIC = [partial(loss, beta=B, **params) for loss, params, _ in OF_Z + OTHERS] + [
    losses.sft,
    partial(losses.aot, beta=B, label_smoothing=0.1),
    partial(losses.aot_unpaired, beta=B, label_smoothing=0.1),
    partial(losses.dpo, beta=B, sft_loss_weight=0.5),
    partial(losses.combine, losses=[(partial(losses.dpo, beta=B), 0.8), (losses.sft, 0.3)], ld_alpha=0.5),
]
SURROGATE = {"entropy_regularization": 0.1, "entropy_mode": "sampled_surrogate"}
LOSSES = [
    *SYMMETRIC,
    *[partial(losses.xpo, alpha=0.2, **entropy) for entropy in (SURROGATE, {"entropy_regularization": 0.1})],
    *[partial(losses.nash_md, beta=B, **entropy) for entropy in (SURROGATE, {})],
    partial(losses.combine, losses=[(partial(losses.ipo, beta=B), 1.0)], **SURROGATE),
    partial(losses.combine, losses=[(partial(losses.dpo, beta=B), 1.0)], weigh_by_policy=True),
]
WITHOUT_GRADIENT_OF_VALUE = (losses.aot_unpaired, losses.nash_md)  # by design: see their docstrings


def has_gradient_of_value(loss):
    return getattr(loss, "func", loss) not in WITHOUT_GRADIENT_OF_VALUE and not getattr(loss, "keywords", {}).get("weigh_by_policy")


def name(loss):
    return f"{loss.func.__name__}-{loss.keywords}"[:60] if isinstance(loss, partial) else loss.__name__


def outcome(loss, pairs):
    policy = pairs.policy_K.clone().requires_grad_()
    out = loss(with_policy(pairs, policy))
    out.loss_sum.backward()
    return out, policy.grad


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_order_and_packing_do_not_matter(data):
    loss = data.draw(st.sampled_from(LOSSES))
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=7))
    preference = data.draw(st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0]), min_size=len(lengths), max_size=len(lengths)))
    order = data.draw(st.permutations(range(len(lengths))))
    cut = sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=3)))
    pairs = make_pairs(data.draw(st.integers(0, 99)), lengths, preference, dtype=torch.float64)

    whole, grad = outcome(loss, pairs)
    packs = [list(order[a:b]) for a, b in zip([0, *cut], [*cut, len(order)], strict=True)]
    results = [outcome(loss, subset(pairs, pack)) for pack in packs]
    assert sum(out.count for out, _ in results) == whole.count
    assert sum(out.loss_sum.item() for out, _ in results) == pytest.approx(whole.loss_sum.item(), rel=1e-9, abs=1e-9)
    for key, value in whole.metric_sums.items():
        assert sum(out.metric_sums[key].item() for out, _ in results) == pytest.approx(value.item(), rel=1e-9, abs=1e-9), key
    tokens = [k for pack in packs for i in pack for k in torch.nonzero(pairs.cell_K // 2 == i).view(-1).tolist()]
    assert torch.allclose(torch.cat([g for _, g in results]), grad[tokens], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", SYMMETRIC, ids=name)
def test_swapping_the_sides_and_the_preference_changes_nothing(loss):
    pairs = make_pairs(preference=[1.0, 0.2, 0.7, 0.0])
    extras = pairs.extras_P | {"score_first": pairs.extras_P["score_second"], "score_second": pairs.extras_P["score_first"]}
    swapped = type(pairs)(pairs.policy_K, pairs.ref_K, pairs.cell_K ^ 1, 1 - pairs.preference_P, extras, pairs.extras_K)
    a, b = loss(pairs), loss(swapped)
    assert a.loss_sum.item() == pytest.approx(b.loss_sum.item(), rel=1e-5)
    for key, value in a.metric_sums.items():
        assert value.item() == pytest.approx(b.metric_sums[key].item(), rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("loss", list(filter(has_gradient_of_value, LOSSES)), ids=name)
def test_gradient_is_the_numerical_one(loss):
    pairs = make_pairs(preference=[1.0, 0.3, 0.0, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda policy: loss(with_policy(pairs, policy)).loss_sum, pairs.policy_K.clone().requires_grad_())


RATIOS = [(a, b) for a in (-200.0, -90.0, 0.0, 90.0, 200.0) for b in (-200.0, 0.0, 200.0)]


def extreme(ratios):
    """A pair for each (r first, r second), with one token a side."""
    pairs = make_pairs(0, [(1, 1)] * len(ratios), [1.0, 0.0, 0.5] * (len(ratios) // 3))
    ratio = torch.tensor(ratios).view(-1)
    return type(pairs)(ratio.clamp(max=0), -ratio.clamp(min=0), pairs.cell_K, pairs.preference_P, pairs.extras_P, pairs.extras_K)


@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_finite_at_extreme_log_ratios(loss):
    has_beta = "beta" in inspect.signature(loss).parameters
    for variant in [partial(loss, beta=beta) for beta in (0.1, 1.0)] if has_beta else [loss]:
        out, grad = outcome(variant, extreme(RATIOS))
        assert out.loss_sum.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize(("loss", "params"), [(loss, params) for loss, params, _ in OF_Z if loss not in (losses.ipo, losses.sppo_hard)])
def test_finite_at_extreme_log_ratios_with_another_divergence(loss, params):
    """But for the losses that square an exponential."""
    for divergence, _ in DIVERGENCES:
        out, grad = outcome(partial(loss, **params, **divergence), extreme(RATIOS))
        assert out.loss_sum.isfinite() and grad.isfinite().all(), divergence


@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_no_pairs(loss):
    weight = torch.ones(4, requires_grad=True)
    pairs = subset(make_pairs(), [])
    out = loss(with_policy(pairs, weight[:0] * 2))
    out.loss_sum.backward()
    assert out.loss_sum.item() == 0 and out.count == 0 and weight.grad.tolist() == [0, 0, 0, 0]
    assert all(value.item() == 0 for value in out.metric_sums.values())
    assert out.metric_sums.keys() == loss(make_pairs()).metric_sums.keys()
