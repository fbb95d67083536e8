"""Losses of single completions that are desirable or not: `(UnpairedLogps, *, params) -> LossOutput`. Notation in `losses`; C completions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, sigmoid

from megapref.batch import LossOutput, UnpairedLogps
from megapref.losses.terms import Positive


def kto(completions: UnpairedLogps, *, beta: Positive = 0.1, lambda_d: float = 1.0, lambda_u: float = 1.0) -> LossOutput:
    """lambda_d (1 - s(b (r - K))) of desirable, lambda_u (1 - s(b (K - r))) of undesirable completions: KTO, arXiv 2402.01306 eq. 7.

    K is the completions' extra `kl`, `kto_baseline` of the global batch.
    """
    u_C = beta * (completions.log_ratio_C - completions.extras_C["kl"])
    return _total(completions, lambda_d * sigmoid(-u_C), lambda_u * sigmoid(u_C), beta)


def kto_baseline(mismatched_ratio_G: Tensor) -> Tensor:
    """max(0, mean of r) of completions after prompts that are not theirs, over the global batch; no gradient."""
    return mismatched_ratio_G.detach().mean().clamp(min=0)


def apo_zero_unpaired(completions: UnpairedLogps, *, beta: Positive = 0.1) -> LossOutput:
    """1 - s(b r) of desirable, s(b r) of undesirable completions: arXiv 2408.06266 eq. 7."""
    u_C = beta * completions.log_ratio_C
    return _total(completions, sigmoid(-u_C), sigmoid(u_C), beta)


def bco(completions: UnpairedLogps, *, beta: Positive = 0.1) -> LossOutput:
    """-LS(b r - delta) of desirable, -LS(-(b r - delta)) of undesirable completions: BCO, arXiv 2404.04656.

    delta is the completions' extra `delta`, the mean of b r in the run so far.
    """
    u_C = beta * completions.log_ratio_C - completions.extras_C["delta"]
    return _total(completions, -logsigmoid(u_C), -logsigmoid(-u_C), beta)


def _total(completions: UnpairedLogps, desirable_C: Tensor, undesirable_C: Tensor, beta: float) -> LossOutput:
    """The sum of the losses that fit the labels, with metrics that are means over all completions."""
    is_desirable_C = completions.desirable_C
    loss = torch.where(is_desirable_C, desirable_C, undesirable_C).sum()
    with torch.no_grad():
        ratio_C = completions.log_ratio_C
        reward_C = beta * ratio_C
        metric_sums = {
            "rewards/margins": torch.where(is_desirable_C, reward_C, -reward_C).sum(),
            "rewards/accuracies": torch.where(is_desirable_C, reward_C > 0, reward_C < 0).float().sum(),
            "rewards/mean": reward_C.sum(),
            "objective/kl": ratio_C.sum(),
            "objective/non_score_reward": -reward_C.sum(),
            "objective/entropy": -completions.policy_C.sum(),
        }
    return LossOutput(loss, len(is_desirable_C), metric_sums)
