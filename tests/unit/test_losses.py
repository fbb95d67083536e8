import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapref.batch import PairLogps
from megapref.losses import dpo, ipo, sft

CELLS = [0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 5]  # three pairs with (3, 2), (1, 4) and (1, 1) tokens


def make_pairs(preference, seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    policy, ref = -3 * torch.rand(2, len(CELLS), generator=generator)
    return PairLogps(policy.requires_grad_(requires_grad), ref, torch.tensor(CELLS), torch.tensor(preference))


def by_hand(pairs):
    """Plain floats: per pair ((lp, lr, n) of first, (lp, lr, n) of second, preference)."""
    rows = []
    for i, p in enumerate(pairs.preference_P.tolist()):
        sides = []
        for side in (0, 1):
            ks = [k for k, cell in enumerate(pairs.cell_K.tolist()) if cell == 2 * i + side]
            sides.append((sum(pairs.policy_K[k].item() for k in ks), sum(pairs.ref_K[k].item() for k in ks), len(ks)))
        rows.append((*sides, p))
    return rows


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def plain_dpo(first, second, p, beta, eps=0.0):
    d = (first[0] - first[1]) - (second[0] - second[1])
    p = p * (1 - eps) + (1 - p) * eps
    return -p * log_sigmoid(beta * d) - (1 - p) * log_sigmoid(-beta * d)


def plain_ipo(first, second, p, beta, average):
    h = (first[0] - first[1]) / (first[2] if average else 1) - (second[0] - second[1]) / (second[2] if average else 1)
    return p * (h - 1 / (2 * beta)) ** 2 + (1 - p) * (-h - 1 / (2 * beta)) ** 2


PREFERENCES = [[1.0, 1.0, 1.0], [1.0, 0.0, 0.7], [0.5, 0.2, 0.0]]


@pytest.mark.parametrize("preference", PREFERENCES)
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_dpo_is_its_formula(preference, eps):
    pairs = make_pairs(preference)
    want = sum(plain_dpo(*row, beta=0.3, eps=eps) for row in by_hand(pairs))
    out = dpo(pairs, beta=0.3, label_smoothing=eps)
    assert out.loss_sum.item() == pytest.approx(want, rel=1e-5) and out.count == 3


@pytest.mark.parametrize("preference", PREFERENCES)
@pytest.mark.parametrize("average", [False, True])
def test_ipo_is_its_formula(preference, average):
    pairs = make_pairs(preference)
    want = sum(plain_ipo(*row, beta=0.3, average=average) for row in by_hand(pairs))
    assert ipo(pairs, beta=0.3, average_log_probs=average).loss_sum.item() == pytest.approx(want, rel=1e-5)


def test_sft_is_the_chosen_sides_negative_log_likelihood():
    pairs = make_pairs([1.0, 0.0, 1.0])
    chosen = [(row[0] if row[2] >= 0.5 else row[1]) for row in by_hand(pairs)]
    assert sft(pairs).loss_sum.item() == pytest.approx(sum(-lp / n for lp, _, n in chosen), rel=1e-5)
    out = sft(pairs, average_log_probs=False)
    assert out.loss_sum.item() == pytest.approx(sum(-lp for lp, _, _ in chosen), rel=1e-5)
    assert out.metric_sums["logps/chosen"].item() == pytest.approx(sum(lp for lp, _, _ in chosen), rel=1e-5)


def test_sft_of_an_empty_second_side():
    policy = torch.tensor([-1.0, -3.0, -0.5])
    out = sft(PairLogps(policy, torch.zeros(3), torch.tensor([0, 0, 2]), torch.ones(2)))
    assert out.loss_sum.item() == pytest.approx(2.5)
    assert out.metric_sums["objective/entropy"].item() == pytest.approx(4.5)


@pytest.mark.parametrize(("loss", "golden"), [(dpo, math.log(2)), (ipo, 1 / (4 * 0.1**2))])
@pytest.mark.parametrize("preference", [1.0, 0.0, 0.3])
def test_golden_value_where_policy_is_reference(loss, golden, preference):
    pairs = make_pairs([preference] * 3)
    out = loss(replace(pairs, ref_K=pairs.policy_K), beta=0.1)
    assert out.loss_sum.item() == pytest.approx(3 * golden, rel=1e-6)
    sums = out.metric_sums
    assert sums["rewards/margins"].item() == 0 and sums["rewards/accuracies"].item() == 0 and sums["objective/kl"].item() == 0


def test_metrics_against_plain_sums():
    pairs, beta = make_pairs([1.0, 0.0, 0.5]), 0.3
    rows = [(first, second) if p >= 0.5 else (second, first) for first, second, p in by_hand(pairs)]
    reward = [[beta * (lp - lr) for lp, lr, _ in row] for row in rows]
    kl = sum((w[0] - w[1] + x[0] - x[1]) / 2 for w, x in rows)
    want = {
        "rewards/chosen": sum(w for w, _ in reward),
        "rewards/rejected": sum(x for _, x in reward),
        "rewards/accuracies": sum(w > x for w, x in reward),
        "rewards/margins": sum(w - x for w, x in reward),
        "logps/chosen": sum(w[0] for w, _ in rows),
        "logps/rejected": sum(x[0] for _, x in rows),
        "objective/kl": kl,
        "objective/entropy": -sum((w[0] + x[0]) / 2 for w, x in rows),
        "objective/non_score_reward": -beta * kl,
    }
    got = dpo(pairs, beta=beta).metric_sums
    assert {key: value.item() for key, value in got.items()} == pytest.approx(want, rel=1e-4)
    assert not any(value.requires_grad for value in dpo(make_pairs([1.0] * 3, requires_grad=True)).metric_sums.values())


@pytest.mark.parametrize("loss", [dpo, ipo, sft])
def test_gradient_is_the_numerical_one(loss):
    pairs = make_pairs([1.0, 0.3, 0.0])

    def of(policy_K):
        return loss(PairLogps(policy_K, pairs.ref_K.double(), pairs.cell_K, pairs.preference_P.double())).loss_sum

    assert torch.autograd.gradcheck(of, pairs.policy_K.double().requires_grad_())


@pytest.mark.parametrize("loss", [dpo, ipo, sft])
def test_an_empty_pack_counts_nothing_and_still_goes_backward(loss):
    weight = torch.ones(4, requires_grad=True)
    out = loss(PairLogps(weight[:0] * 2, torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0)))
    out.loss_sum.backward()
    assert out.loss_sum.item() == 0 and out.count == 0 and weight.grad.tolist() == [0, 0, 0, 0]
    assert all(value.item() == 0 for value in out.metric_sums.values())


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3), st.integers(0, 9), st.sampled_from([dpo, ipo, sft]))
def test_swapping_the_sides_and_the_preference_changes_nothing(preference, seed, loss):
    pairs = make_pairs([0.25 if p == 0.5 else p for p in preference], seed)
    swapped = PairLogps(pairs.policy_K, pairs.ref_K, pairs.cell_K ^ 1, 1 - pairs.preference_P)
    a, b = loss(pairs), loss(swapped)
    assert a.loss_sum.item() == pytest.approx(b.loss_sum.item(), rel=1e-4)
    for key, value in a.metric_sums.items():
        assert value.item() == pytest.approx(b.metric_sums[key].item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("loss", [dpo, ipo, sft])
def test_one_pack_is_the_sum_of_its_pairs(loss):
    pairs = make_pairs([1.0, 0.3, 0.0])
    total = 0.0
    for i in range(3):
        mine = pairs.cell_K // 2 == i
        alone = PairLogps(pairs.policy_K[mine], pairs.ref_K[mine], pairs.cell_K[mine] - 2 * i, pairs.preference_P[i : i + 1])
        total += loss(alone).loss_sum.item()
    assert loss(pairs).loss_sum.item() == pytest.approx(total, rel=1e-5)
