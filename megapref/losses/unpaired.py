"""Losses of single completions that are desirable or not: `(UnpairedLogps, *, params) -> LossOutput`. Notation in `losses`; C completions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, sigmoid

from megapref.batch import LossOutput, UnpairedLogps
from megapref.losses.terms import Positive, needing, of_completions


@of_completions
@needing(lambda params: {"kl"})
def kto(completions: UnpairedLogps, *, beta: Positive = 0.1, lambda_d: float = 1.0, lambda_u: float = 1.0) -> LossOutput:
    """lambda_d (1 - s(b (r - K))) of desirable, lambda_u (1 - s(b (K - r))) of undesirable completions: KTO, arXiv 2402.01306 eq. 7.

    K is the completions' extra `kl`: max(0, mean of r) over the global batch's completions after prompts that are not theirs, without gradient.
    """
    u_C = beta * (completions.log_ratio_C - completions.extras_C["kl"])
    output = _total(completions, lambda_d * sigmoid(-u_C), lambda_u * sigmoid(u_C), beta)
    return replace(output, metric_sums=output.metric_sums | {"kto/kl": completions.extras_C["kl"].sum()})


@of_completions
def apo_zero_unpaired(completions: UnpairedLogps, *, beta: Positive = 0.1) -> LossOutput:
    """1 - s(b r) of desirable, s(b r) of undesirable completions: arXiv 2408.06266 eq. 7."""
    u_C = beta * completions.log_ratio_C
    return _total(completions, sigmoid(-u_C), sigmoid(u_C), beta)


@of_completions
@needing(lambda params: {"mean_log_ratio"})
def bco(completions: UnpairedLogps, *, beta: Positive = 0.1) -> LossOutput:
    """-LS(b r - delta) of desirable, -LS(-(b r - delta)) of undesirable completions: BCO, arXiv 2404.04656.

    delta is b times the completions' extra `mean_log_ratio`, the mean of r over all completions of the steps before.
    """
    u_C = beta * (completions.log_ratio_C - completions.extras_C["mean_log_ratio"])
    return _total(completions, -logsigmoid(u_C), -logsigmoid(-u_C), beta)


def _total(completions: UnpairedLogps, desirable_C: Tensor, undesirable_C: Tensor, beta: float) -> LossOutput:
    """The sum of the losses that fit the labels; rewards of the desirable ("chosen") and of the others, other metrics of all completions."""
    is_desirable_C = completions.desirable_C
    loss = torch.where(is_desirable_C, desirable_C, undesirable_C).sum()
    with torch.no_grad():
        ratio_C = completions.log_ratio_C
        reward_C = beta * ratio_C
        desirable_C = is_desirable_C.float()
        metric_sums = {
            "rewards/margins": torch.where(is_desirable_C, reward_C, -reward_C).sum(),
            "rewards/accuracies": torch.where(is_desirable_C, reward_C > 0, reward_C < 0).float().sum(),
            "rewards/mean": reward_C.sum(),
            "rewards/chosen": (reward_C * desirable_C).sum(),
            "count rewards/chosen": desirable_C.sum(),
            "rewards/rejected": (reward_C * (1 - desirable_C)).sum(),
            "count rewards/rejected": (1 - desirable_C).sum(),
            "objective/kl": ratio_C.sum(),
            "objective/non_score_reward": -reward_C.sum(),
            "objective/entropy": -completions.policy_C.sum(),
        }
    return LossOutput(loss, len(is_desirable_C), metric_sums)
