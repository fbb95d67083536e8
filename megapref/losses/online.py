"""Losses of online methods, in which the first completion is the policy's own sample. Notation in `losses`."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from megapref.batch import LossOutput, PairLogps
from megapref.losses.pairs import dpo, ipo
from megapref.losses.terms import EntropyMode, Positive, entropy, first_only, log_ratios, needing, needs_entropy, total


@needing(needs_entropy)
def xpo(
    pairs: PairLogps,
    *,
    beta: Positive = 0.1,
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid",
    alpha: float = 1e-5,
    entropy_regularization: float = 0.0,
    entropy_mode: EntropyMode = "full_vocab",
) -> LossOutput:
    """DPO or IPO + alpha lp(second) - c H(first): XPO, arXiv 2405.21046 eq. 8; the second completion is the reference's, whichever won.

    c is `entropy_regularization`, H the `terms.entropy` of the first completion. Both parts are metrics, loss/dpo and loss/xpo.
    """
    base = (dpo if loss_type == "sigmoid" else ipo)(pairs, beta=beta)
    exploration = total(pairs, alpha * pairs.policy_P2[:, 1] - _weighted_entropy(pairs, entropy_regularization, entropy_mode), {}).loss_sum
    metric_sums = base.metric_sums | {"loss/dpo": base.loss_sum.detach(), "loss/xpo": exploration.detach()}
    return replace(base, loss_sum=base.loss_sum + exploration, metric_sums=metric_sums)


@first_only
@needing(needs_entropy)
def nash_md(
    pairs: PairLogps, *, beta: Positive = 0.1, entropy_regularization: float = 0.0, entropy_mode: EntropyMode = "full_vocab"
) -> LossOutput:
    """b sum_t kl_t log pi_t - (p - 0.5) sum_t log pi_t of the first completion: Nash-MD, arXiv 2312.00886.

    kl_t = log pi_t - log ref_t without gradient; p is the preference of the first completion over the second, which is not trained on and may
    be empty. The entropy as in `xpo`. The value of the loss says nothing, its gradient is the policy's.
    """
    kl_K = (pairs.policy_K - pairs.ref_K).detach()
    pull_P = beta * pairs.sum_by_completion(kl_K * pairs.policy_K)[:, 0]
    score_P = (pairs.preference_P - 0.5) * pairs.policy_P2[:, 0]
    loss_P = pull_P - score_P - _weighted_entropy(pairs, entropy_regularization, entropy_mode)
    of_parts = {"loss/kl": pull_P.detach().sum(), "loss/score": score_P.detach().sum()}
    return total(pairs, loss_P, metrics_of_first(pairs, beta) | of_parts)


def _weighted_entropy(pairs: PairLogps, weight: float, mode: EntropyMode) -> Tensor | float:
    return weight * entropy(pairs, mode)[:, 0] if weight else 0.0


@torch.no_grad()
def metrics_of_first(pairs: PairLogps, beta: float) -> dict[str, Tensor]:
    """Sums of the metrics of `terms.metrics_with_reference` where the first completion alone is there.

    It counts as chosen where its preference is at least 0.5, as rejected elsewhere: those means are over as many pairs. The implicit reward of
    the side that is not there is taken as 0: margins are b r of a chosen completion, -b r of a rejected one, and right if above 0.
    """
    wins_P = pairs.preference_P >= 0.5
    lp_P, lr_P, length_P = pairs.policy_P2[:, 0], pairs.ref_P2[:, 0], pairs.length_P2[:, 0]
    reward_P = beta * log_ratios(pairs)[:, 0]
    margin_P = torch.where(wins_P, reward_P, -reward_P)
    metric_sums = {
        "rewards/margins": margin_P.sum(),
        "rewards/accuracies": (margin_P > 0).float().sum(),
        "rewards/probabilities": pairs.preference_P.sum(),
        "objective/kl": (lp_P - lr_P).sum(),
        "objective/entropy": -lp_P.sum(),
        "objective/non_score_reward": -reward_P.sum(),
    }
    of_side = {"rewards/": reward_P, "logps/": lp_P, "logps/ref_": lr_P, "length/": length_P}
    for side, is_there_P in (("chosen", wins_P), ("rejected", ~wins_P)):
        for prefix, value_P in of_side.items():
            metric_sums[prefix + side] = value_P[is_there_P].sum()
            metric_sums[f"count {prefix}{side}"] = is_there_P.float().sum()
    return metric_sums
