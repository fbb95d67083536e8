"""Pairs of made-up log-probabilities, and every pair loss as a formula of one pair in plain floats."""

import math
from dataclasses import replace

import torch

from megapref import losses
from megapref.batch import PairLogps

LENGTHS = [(3, 2), (1, 4), (1, 1), (5, 5)]
SCORES = [(0.4, -0.3), (-1.0, 2.0), (0.0, 0.0), (3.0, 1.5)]
PREFERENCE = [1.0, 0.0, 0.7, 1.0]
B, EPS, DELTA = 0.3, 0.2, 0.25


def make_pairs(seed=0, lengths=LENGTHS, preference=PREFERENCE, scale=3.0, dtype=torch.float32):
    cells = torch.tensor([2 * i + side for i, pair in enumerate(lengths) for side in (0, 1) for _ in range(pair[side])], dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    policy, ref = -scale * torch.rand(2, len(cells), generator=generator, dtype=dtype)
    count = len(lengths)
    score = torch.tensor(SCORES * (count // len(SCORES) + 1))[:count].to(dtype)
    extras = {"score_first": score[:, 0], "score_second": score[:, 1], "mean_log_ratio": torch.full((count,), DELTA / B, dtype=dtype)}
    gathered = {name: torch.linspace(-1, 1, count, dtype=dtype) for name in ("aot_reference_gap", "aot_rejected_ratio", "aot_chosen_ratio")}
    of_token = {"entropy": 1 + policy.abs(), "log_sum_sq": policy.sin().abs() - 2}
    return PairLogps(policy, ref, cells, torch.tensor(preference, dtype=dtype), extras | gathered, of_token)


def subset(pairs, chosen):
    """The pairs with these numbers, in this order, as a pack of its own."""
    tokens = [k for i in chosen for k in torch.nonzero(pairs.cell_K // 2 == i).view(-1).tolist()]
    new_number = torch.zeros(len(pairs.preference_P), dtype=torch.int64)
    new_number[chosen] = torch.arange(len(chosen))
    return PairLogps(
        pairs.policy_K[tokens],
        pairs.ref_K[tokens],
        2 * new_number[pairs.cell_K[tokens] // 2] + pairs.cell_K[tokens] % 2,
        pairs.preference_P[chosen],
        {name: value[chosen] for name, value in pairs.extras_P.items()},
        {name: value[tokens] for name, value in pairs.extras_K.items()},
    )


def with_policy(pairs, policy_K):
    return replace(pairs, policy_K=policy_K)


class Side:
    """What the formulas say of a completion: lp, lr, n, r, z and the ground truth's score."""

    def __init__(self, pairs, pair, side, z):
        tokens = [k for k, cell in enumerate(pairs.cell_K.tolist()) if cell == 2 * pair + side]
        self.lp, self.lr, self.n = sum(pairs.policy_K[tokens].tolist()), sum(pairs.ref_K[tokens].tolist()), len(tokens)
        self.r, self.z = self.lp - self.lr, z(self.lp - self.lr)
        self.score = pairs.extras_P[("score_first", "score_second")[side]][pair].item()
        self.p = math.exp(self.lp / self.n)


def s(x):
    return 1 / (1 + math.exp(-x))


def LS(x):
    return -math.log1p(math.exp(-x))


def kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def smooth(u, eps):
    return -(1 - eps) * LS(u) - eps * LS(-u)


def log_odds(side):
    return math.log(side.p / (1 - side.p))


def discopop(u, tau):
    return (1 - s(u / tau)) * -LS(u) + s(u / tau) * math.exp(-u)


def goal(w, x):
    return 0.5 * (w.score - x.score)


# loss, parameters, loss of (chosen, rejected); those of z also hold for other divergences
OF_Z = [
    (losses.dpo, {}, lambda w, x: -LS(B * (w.z - x.z))),
    (losses.dpo, {"label_smoothing": EPS}, lambda w, x: smooth(B * (w.z - x.z), EPS)),
    (losses.dpo, {"preference_average_log_probs": True}, lambda w, x: -LS(B * (w.z / w.n - x.z / x.n))),
    (losses.sigmoid_norm, {}, lambda w, x: -LS(B * (w.z / w.n - x.z / x.n))),
    (losses.hinge, {}, lambda w, x: max(0, 1 - B * (w.z - x.z))),
    (losses.ipo, {}, lambda w, x: (w.z - x.z - 1 / (2 * B)) ** 2),
    (losses.ipo, {"average_log_probs": True}, lambda w, x: (w.z / w.n - x.z / x.n - 1 / (2 * B)) ** 2),
    (losses.exo_pair, {}, lambda w, x: kl(s(B * (w.z - x.z)), 1 - 1e-3)),
    (losses.exo_pair, {"label_smoothing": EPS}, lambda w, x: kl(s(B * (w.z - x.z)), 1 - EPS)),
    (losses.nca_pair, {}, lambda w, x: -LS(B * w.z) - 0.5 * LS(-B * w.z) - 0.5 * LS(-B * x.z)),
    (losses.robust, {}, lambda w, x: -LS(B * (w.z - x.z))),
    (
        losses.robust,
        {"label_smoothing": EPS},
        lambda w, x: (-(1 - EPS) * LS(B * (w.z - x.z)) + EPS * LS(-B * (w.z - x.z))) / (1 - 2 * EPS),
    ),
    (losses.bco_pair, {}, lambda w, x: -LS(B * w.z) - LS(-B * x.z)),
    (losses.bco_pair, {"running_delta": True}, lambda w, x: -LS(B * w.z - DELTA) - LS(-(B * x.z - DELTA))),
    (losses.sppo_hard, {}, lambda w, x: (w.z - 1 / (2 * B)) ** 2 + (x.z + 1 / (2 * B)) ** 2),
    (losses.apo_down, {}, lambda w, x: s(B * w.r) + 1 - s(B * (w.z - x.z))),
    (losses.discopop, {}, lambda w, x: discopop(B * (w.z - x.z), 0.05)),
    (losses.discopop, {"tau": 0.5}, lambda w, x: discopop(B * (w.z - x.z), 0.5)),
    (losses.dpop, {}, lambda w, x: -LS(B * (w.z - x.z - 50 * max(0, w.lr - w.lp)))),
    (losses.dpop, {"dpop_lambda": 2.0, "label_smoothing": EPS}, lambda w, x: smooth(B * (w.z - x.z - 2 * max(0, w.lr - w.lp)), EPS)),
]
OTHERS = [
    (losses.apo_zero, {}, lambda w, x: 1 - s(B * w.r) + s(B * x.r)),
    (losses.rpo_sq, {"gt_reward_scale": 0.5}, lambda w, x: (B * (w.r - x.r) - goal(w, x)) ** 2),
    (losses.rpo_bwd_kl, {"gt_reward_scale": 0.5}, lambda w, x: kl(s(goal(w, x)), s(B * (w.r - x.r)))),
    (losses.rpo_fwd_kl, {"gt_reward_scale": 0.5}, lambda w, x: kl(s(B * (w.r - x.r)), s(goal(w, x)))),
    (losses.simpo, {"gamma": 0.4}, lambda w, x: -LS(B * (w.lp / w.n - x.lp / x.n) - 0.4)),
    (losses.cpo, {"cpo_alpha": 0.6}, lambda w, x: -LS(B * (w.lp - x.lp)) - 0.6 * w.lp / w.n),
    (losses.cpo, {"label_smoothing": EPS, "sft_average_log_probs": False}, lambda w, x: smooth(B * (w.lp - x.lp), EPS) - w.lp),
    (losses.orpo, {}, lambda w, x: -w.lp / w.n - B * LS(log_odds(w) - log_odds(x))),
    (losses.xpo, {"alpha": 0.0}, lambda w, x: -LS(B * (w.r - x.r))),
    (losses.xpo, {"alpha": 0.0, "loss_type": "ipo"}, lambda w, x: (w.r - x.r - 1 / (2 * B)) ** 2),
]
DIVERGENCES = [
    ({"f_divergence": "forward_kl"}, lambda r: -math.exp(-r)),
    ({"f_divergence": "js_divergence"}, LS),
    ({"f_divergence": "alpha_divergence"}, lambda r: math.exp(-0.5 * r) / -0.5),
    ({"f_divergence": "alpha_divergence", "alpha": 1.7}, lambda r: math.exp(0.7 * r) / 0.7),
    ({"f_divergence": "alpha_divergence", "alpha": 1 + 1e-7}, lambda r: r),
]


def plain(pairs, of_reading, z=lambda r: r):
    total = 0.0
    for i, p in enumerate(pairs.preference_P.tolist()):
        first, second = (Side(pairs, i, side, z) for side in (0, 1))
        total += p * of_reading(first, second) + (1 - p) * of_reading(second, first)
    return total
