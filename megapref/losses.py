"""Preference losses: pure functions `(PairLogps, *, params) -> LossOutput` of completion-token log-probabilities.

They see no parallelism: every sum is over the pairs of one pack, and the step divides by the global number of pairs.
Notation: w chosen, l rejected; lp and lr the summed log-probabilities of policy and reference, n the number of tokens of a completion;
r = lp - lr, d = r_w - r_l; b is beta, eps label_smoothing, LS log-sigmoid. Everything is computed in float32.
A preference p = P(first is better) weighs both readings of a pair: p loss(first, second) + (1 - p) loss(second, first).
Metrics call the side with p >= 0.5 chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megapref.batch import LossOutput, PairLogps


def dpo(pairs: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> LossOutput:
    """-(1 - eps) LS(b d) - eps LS(-b d): DPO, arXiv 2305.18290 eq. 7; eps = label_smoothing > 0 is conservative DPO."""
    log_ratio_P2 = pairs.policy_P2 - pairs.ref_P2
    return _preference_loss(pairs, _of_margin(log_ratio_P2, lambda d_P: -logsigmoid(beta * d_P)), beta, label_smoothing)


def ipo(pairs: PairLogps, *, beta: float = 0.1, average_log_probs: bool = False) -> LossOutput:
    """(d - 1 / (2 b))^2: IPO, arXiv 2310.12036 eq. 17; with `average_log_probs` d is of per-token means instead of sums."""
    log_ratio_P2 = pairs.policy_P2 - pairs.ref_P2
    if average_log_probs:
        log_ratio_P2 = log_ratio_P2 / pairs.length_P2.clamp(min=1)
    return _preference_loss(pairs, _of_margin(log_ratio_P2, lambda d_P: (d_P - 1 / (2 * beta)) ** 2), beta)


def sft(pairs: PairLogps, *, average_log_probs: bool = True) -> LossOutput:
    """-lp_w / n_w, or -lp_w without `average_log_probs`: negative log-likelihood of the chosen side; the rejected side may be empty."""
    nll_P2 = -pairs.policy_P2
    if average_log_probs:
        nll_P2 = nll_P2 / pairs.length_P2.clamp(min=1)
    loss_P = _chosen_rejected(pairs, nll_P2)[0]
    with torch.no_grad():
        chosen_logps_P, _ = _chosen_rejected(pairs, pairs.policy_P2)
        metric_sums = {"logps/chosen": chosen_logps_P.sum(), "objective/entropy": -_mean_of_sides(pairs, pairs.policy_P2).sum()}
    return LossOutput(loss_P.sum(), len(loss_P), metric_sums)


PairPenalty = Callable[[int, int], Tensor]  # (chosen side, rejected side) -> [P], the loss if that reading of the pair is right


def _of_margin(value_P2: Tensor, penalty: Callable[[Tensor], Tensor]) -> PairPenalty:
    return lambda chosen, rejected: penalty(value_P2[:, chosen] - value_P2[:, rejected])


def _preference_loss(pairs: PairLogps, penalty: PairPenalty, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """Both readings of each pair weighed by the smoothed preference, with the metrics that all preference losses share."""
    p_P = pairs.preference_P * (1 - label_smoothing) + (1 - pairs.preference_P) * label_smoothing
    loss_P = p_P * penalty(0, 1) + (1 - p_P) * penalty(1, 0)
    return LossOutput(loss_P.sum(), len(loss_P), _metric_sums(pairs, beta))


@torch.no_grad()
def _metric_sums(pairs: PairLogps, beta: float) -> dict[str, Tensor]:
    """Sums over pairs of the metrics that a run logs; rewards are b r, kl and entropy are estimates from the completion's own tokens."""
    log_ratio_P2 = pairs.policy_P2 - pairs.ref_P2
    chosen_P, rejected_P = _chosen_rejected(pairs, beta * log_ratio_P2)
    chosen_logps_P, rejected_logps_P = _chosen_rejected(pairs, pairs.policy_P2)
    kl = _mean_of_sides(pairs, log_ratio_P2).sum()
    return {
        "rewards/chosen": chosen_P.sum(),
        "rewards/rejected": rejected_P.sum(),
        "rewards/accuracies": (chosen_P > rejected_P).float().sum(),
        "rewards/margins": (chosen_P - rejected_P).sum(),
        "logps/chosen": chosen_logps_P.sum(),
        "logps/rejected": rejected_logps_P.sum(),
        "objective/kl": kl,
        "objective/entropy": -_mean_of_sides(pairs, pairs.policy_P2).sum(),
        "objective/non_score_reward": -beta * kl,
    }


def _chosen_rejected(pairs: PairLogps, value_P2: Tensor) -> tuple[Tensor, Tensor]:
    first_P, second_P = value_P2.unbind(1)
    first_wins_P = pairs.preference_P >= 0.5
    return torch.where(first_wins_P, first_P, second_P), torch.where(first_wins_P, second_P, first_P)


def _mean_of_sides(pairs: PairLogps, value_P2: Tensor) -> Tensor:
    """[P]: mean over the completions that a pair has; an empty side is none."""
    return value_P2.sum(1) / (pairs.length_P2 > 0).sum(1).clamp(min=1)
