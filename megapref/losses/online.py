"""Losses of online methods, in which the first completion is the policy's own sample. Notation in `losses`."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from megapref.batch import LossOutput, PairLogps
from megapref.losses.pairs import dpo, ipo
from megapref.losses.terms import Positive, log_ratios, total


def xpo(
    pairs: PairLogps,
    *,
    beta: Positive = 0.1,
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid",
    alpha: float = 1e-5,
    entropy_regularization: float = 0.0,
) -> LossOutput:
    """DPO or IPO + alpha lp(second) - c H(first): XPO, arXiv 2405.21046 eq. 8; the second completion is the reference's, whichever won.

    c is `entropy_regularization`, H the surrogate sum_t -p_t log p_t of the sampled tokens. Both parts are metrics, loss/dpo and loss/xpo.
    """
    base = (dpo if loss_type == "sigmoid" else ipo)(pairs, beta=beta)
    exploration = total(pairs, alpha * pairs.policy_P2[:, 1] - entropy_regularization * _sampled_entropy(pairs), {}).loss_sum
    metric_sums = base.metric_sums | {"loss/dpo": base.loss_sum.detach(), "loss/xpo": exploration.detach()}
    return replace(base, loss_sum=base.loss_sum + exploration, metric_sums=metric_sums)


def nash_md(pairs: PairLogps, *, beta: Positive = 0.1, entropy_regularization: float = 0.0) -> LossOutput:
    """b sum_t kl_t log pi_t - (p - 0.5) sum_t log pi_t of the first completion: Nash-MD, arXiv 2312.00886.

    kl_t = log pi_t - log ref_t without gradient; p is the preference of the first completion over the second, which is not trained on and may
    be empty. `entropy_regularization` as in `xpo`. The value of the loss says nothing, its gradient is the policy's.
    """
    kl_K = (pairs.policy_K - pairs.ref_K).detach()
    pull_P = pairs.sum_by_completion(kl_K * pairs.policy_K)[:, 0]
    loss_P = beta * pull_P - (pairs.preference_P - 0.5) * pairs.policy_P2[:, 0] - entropy_regularization * _sampled_entropy(pairs)
    with torch.no_grad():
        kl = log_ratios(pairs)[:, 0].sum()
        metric_sums = {
            "objective/kl": kl,
            "objective/entropy": -pairs.policy_P2[:, 0].sum(),
            "objective/non_score_reward": -beta * kl,
            "loss/kl": beta * pull_P.sum(),
            "loss/score": -((pairs.preference_P - 0.5) * pairs.policy_P2[:, 0]).sum(),
        }
    return total(pairs, loss_P, metric_sums)


def _sampled_entropy(pairs: PairLogps) -> Tensor:
    """[P]: sum over the first completion's tokens of -p_t log p_t."""
    return pairs.sum_by_completion(-pairs.policy_K.exp() * pairs.policy_K)[:, 0]
