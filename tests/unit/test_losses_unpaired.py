import math

import pytest
import torch

from megapref.batch import UnpairedLogps
from megapref.losses import apo_zero_unpaired, bco, kto

LENGTHS, DESIRABLE, B = [3, 1, 4, 2], [True, False, False, True], 0.3
LOSSES = [kto, apo_zero_unpaired, bco]


def make(dtype=torch.float32, kl=0.4, delta=0.2, only=(0, 1, 2, 3)):
    generator = torch.Generator().manual_seed(1)
    policy, ref = -2 * torch.rand(2, sum(LENGTHS), generator=generator, dtype=dtype)
    cell = torch.tensor([i for i, n in enumerate(LENGTHS) for _ in range(n)])
    keep = torch.tensor([int(i) in only for i in cell], dtype=torch.bool)
    renumbered = torch.tensor([only.index(int(i)) for i in cell[keep]], dtype=torch.int64)
    extras = {"kl": torch.full((len(only),), kl, dtype=dtype), "mean_log_ratio": torch.full((len(only),), delta / B, dtype=dtype)}
    return UnpairedLogps(policy[keep], ref[keep], renumbered, torch.tensor([DESIRABLE[i] for i in only], dtype=torch.bool), extras)


def ratios(completions):
    return [(completions.policy_K - completions.ref_K)[completions.cell_K == i].sum().item() for i in range(4)]


def s(x):
    return 1 / (1 + math.exp(-x))


FORMULAS = [
    (kto, {}, lambda r: 1 - s(B * (r - 0.4)), lambda r: 1 - s(B * (0.4 - r))),
    (kto, {"lambda_d": 1.5, "lambda_u": 0.7}, lambda r: 1.5 * (1 - s(B * (r - 0.4))), lambda r: 0.7 * (1 - s(B * (0.4 - r)))),
    (apo_zero_unpaired, {}, lambda r: 1 - s(B * r), lambda r: s(B * r)),
    (bco, {}, lambda r: -math.log(s(B * r - 0.2)), lambda r: -math.log(s(-(B * r - 0.2)))),
]


@pytest.mark.parametrize(("loss", "params", "desirable", "undesirable"), FORMULAS)
def test_formula(loss, params, desirable, undesirable):
    completions = make()
    out = loss(completions, beta=B, **params)
    want = sum((desirable if good else undesirable)(r) for r, good in zip(ratios(completions), DESIRABLE, strict=True))
    assert out.loss_sum.item() == pytest.approx(want, rel=1e-5) and out.count == 4


def test_metrics():
    completions = make()
    r = ratios(completions)
    signed = [x if good else -x for x, good in zip(r, DESIRABLE, strict=True)]
    want = {
        "rewards/margins": B * sum(signed),
        "rewards/accuracies": sum(x > 0 for x in signed),
        "rewards/mean": B * sum(r),
        "kto/kl": 4 * 0.4,
        "rewards/chosen": B * sum(x for x, good in zip(r, DESIRABLE, strict=True) if good),
        "count rewards/chosen": 2,
        "rewards/rejected": B * sum(x for x, good in zip(r, DESIRABLE, strict=True) if not good),
        "count rewards/rejected": 2,
        "objective/kl": sum(r),
        "objective/non_score_reward": -B * sum(r),
        "objective/entropy": -completions.policy_K.sum().item(),
    }
    assert {name: value.item() for name, value in kto(completions, beta=B).metric_sums.items()} == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_order_and_packing_do_not_matter(loss):
    whole = loss(make(torch.float64), beta=B)
    packs = [loss(make(torch.float64, only=only), beta=B) for only in ((2, 0), (), (3,), (1,))]
    assert sum(out.loss_sum.item() for out in packs) == pytest.approx(whole.loss_sum.item(), rel=1e-12)
    assert sum(out.count for out in packs) == 4
    for name, value in whole.metric_sums.items():
        assert sum(out.metric_sums[name].item() for out in packs) == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_is_the_numerical_one(loss):
    c = make(torch.float64)

    def of(policy_K):
        return loss(UnpairedLogps(policy_K, c.ref_K, c.cell_K, c.desirable_C, c.extras_C), beta=B).loss_sum

    assert torch.autograd.gradcheck(of, c.policy_K.clone().requires_grad_())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("ratio", [-200.0, 200.0])
def test_finite_at_extreme_log_ratios(loss, ratio):
    policy = torch.full((2,), min(ratio, 0.0), requires_grad=True)
    ref = torch.full((2,), -max(ratio, 0.0))
    out = loss(UnpairedLogps(policy, ref, torch.arange(2), torch.tensor([True, False]), dict.fromkeys(("kl", "mean_log_ratio"), torch.zeros(2))))
    out.loss_sum.backward()
    assert out.loss_sum.isfinite() and policy.grad.isfinite().all()
