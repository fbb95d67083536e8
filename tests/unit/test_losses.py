"""Likelihood of the chosen side, and the metrics that all preference losses share."""

import pytest
import torch

from megapref.batch import PairLogps
from megapref.losses import dpo, sft

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
        "logps/ref_chosen": sum(w[1] for w, _ in rows),
        "logps/ref_rejected": sum(x[1] for _, x in rows),
        "length/chosen": sum(w[2] for w, _ in rows),
        "length/rejected": sum(x[2] for _, x in rows),
        "objective/kl": kl,
        "objective/entropy": -sum((w[0] + x[0]) / 2 for w, x in rows),
        "objective/non_score_reward": -beta * kl,
    }
    got = dpo(pairs, beta=beta).metric_sums
    assert {key: value.item() for key, value in got.items()} == pytest.approx(want, rel=1e-4)
    assert not any(value.requires_grad for value in dpo(make_pairs([1.0] * 3, requires_grad=True)).metric_sums.values())
