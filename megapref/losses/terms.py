"""What losses are made of: log-ratios and their transforms, both readings of a pair, the metrics they share, marks that the step reads.

Notation in `losses`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, sigmoid

from megapref.batch import Loss, LossOutput, PairLogps

Positive = Annotated[float, "> 0"]
Fraction = Annotated[float, ">= 0", "<= 1"]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
EntropyMode = Literal["full_vocab", "sampled_surrogate"]
PairPenalty = Callable[[int, int], Tensor]  # (chosen side, rejected side) -> [P], the loss if that reading of the pair is right

_MAX_EXPONENT = 80.0  # exp(80) is far from float32's end


def reference_free(loss: Loss) -> Loss:
    """The loss, marked as one that reads no reference."""
    loss.reference_free = True
    return loss


def of_completions(loss: Loss) -> Loss:
    """The loss, marked as one of single labelled completions (`UnpairedLogps`)."""
    loss.of_completions = True
    return loss


def batch_wide(statistics: Callable[[PairLogps], Tensor], match: Callable[[Tensor], dict[str, Tensor]]) -> Callable[[Loss], Loss]:
    """Marks a loss that compares the pairs of the whole global batch, G of them.

    Before any pack is trained, `statistics(pairs)` [P, X] of every pack is gathered to [G, X]; `match` turns that into extras [G] of the pairs.
    """

    def mark(loss: Loss) -> Loss:
        loss.statistics, loss.match = statistics, match
        return loss

    return mark


def needing(of_params: Callable[[dict[str, Any]], Iterable[str]]) -> Callable[[Loss], Loss]:
    """Marks a loss that has to be given more than log-probabilities: the names as `batch.needs` has them, as a function of its parameters."""

    def mark(loss: Loss) -> Loss:
        loss.needs = of_params
        return loss

    return mark


def first_only(loss: Loss) -> Loss:
    """The loss, marked as one that trains on the first completion alone: the second has only to judge."""
    loss.first_only = True
    return loss


def needs_entropy(params: dict[str, Any]) -> set[str]:
    """What a loss with `entropy_regularization` and `entropy_mode` has to be given; see `entropy`."""
    return {"entropy"} if params.get("entropy_regularization") and params.get("entropy_mode", "full_vocab") == "full_vocab" else set()


def log_ratios(pairs: PairLogps) -> Tensor:
    """[P, 2]: r = lp - lr."""
    return pairs.policy_P2 - pairs.ref_P2


def scores(pairs: PairLogps, f_divergence: Divergence, alpha: float, centered: bool = False) -> Tensor:
    """[P, 2]: z, the transform of r that regularises with another f-divergence than reverse KL, arXiv 2309.16240.

    `alpha` is the coefficient of alpha_divergence. z is f' but for a constant, which cancels between the sides; not so once they are divided by
    their lengths, and `centered` has the constant that makes z(0) = 0. Exponents are clamped at 80.
    """
    ratio_P2, one = log_ratios(pairs), float(centered)
    match f_divergence:
        case "forward_kl":
            return -torch.exp((-ratio_P2).clamp(max=_MAX_EXPONENT)) + one
        case "js_divergence":
            return logsigmoid(ratio_P2) + math.log(2) * one
        case "alpha_divergence" if abs(alpha - 1) >= 1e-6:
            return (torch.exp(((alpha - 1) * ratio_P2).clamp(max=_MAX_EXPONENT)) - one) / (alpha - 1)
        case "alpha_divergence" | "reverse_kl":
            return ratio_P2
        case _:
            raise ValueError(f"f_divergence={f_divergence!r} must be one of reverse_kl, forward_kl, js_divergence, alpha_divergence")


def entropy(pairs: PairLogps, mode: EntropyMode) -> Tensor:
    """[P, 2]: summed over a completion's tokens, the entropy of each one's distribution, or the surrogate -p log p of the sampled token."""
    of_token_K = pairs.extras_K["entropy"] if mode == "full_vocab" else -pairs.policy_K.exp() * pairs.policy_K
    return pairs.sum_by_completion(of_token_K)


def per_token(pairs: PairLogps, value_P2: Tensor) -> Tensor:
    """[P, 2]: values divided by the number of tokens; 0 stays 0 for an empty side."""
    return value_P2 / pairs.length_P2.clamp(min=1)


def bernoulli_kl(logit_P: Tensor, log_p: Tensor | float, log_1mp: Tensor | float) -> Tensor:
    """[P]: KL(Bernoulli(s(logit)) || Bernoulli(p))."""
    return sigmoid(logit_P) * (logsigmoid(logit_P) - log_p) + sigmoid(-logit_P) * (logsigmoid(-logit_P) - log_1mp)


def of_margin(value_P2: Tensor, penalty: Callable[[Tensor], Tensor]) -> PairPenalty:
    """The penalty as a function of the difference between chosen and rejected."""
    return lambda chosen, rejected: penalty(value_P2[:, chosen] - value_P2[:, rejected])


def weigh_readings(pairs: PairLogps, penalty: PairPenalty, label_smoothing: float = 0.0) -> Tensor:
    """[P]: both readings of each pair weighed by the smoothed preference."""
    p_P = pairs.preference_P * (1 - label_smoothing) + (1 - pairs.preference_P) * label_smoothing
    return p_P * penalty(0, 1) + (1 - p_P) * penalty(1, 0)


def preference_loss(pairs: PairLogps, penalty: PairPenalty, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """The penalty of both readings of each pair, with the metrics of losses that compare with a reference."""
    return total(pairs, weigh_readings(pairs, penalty, label_smoothing), metrics_with_reference(pairs, beta))


def total(pairs: PairLogps, loss_P: Tensor, metric_sums: dict[str, Tensor]) -> LossOutput:
    """The sum over pairs, each times its extra `weight` where there is one."""
    if "weight" in pairs.extras_P:
        loss_P = loss_P * pairs.extras_P["weight"]
    return LossOutput(loss_P.sum(), len(loss_P), metric_sums)


def weighted_sum(outputs: list[tuple[str, LossOutput, float]]) -> LossOutput:
    """The sum of (name, output, weight), each one's share as metric loss/<name>; a metric of several is the first one's."""
    metric_sums: dict[str, Tensor] = {}
    for name, output, weight in outputs:
        share = weight * output.loss_sum.detach()
        metric_sums = output.metric_sums | metric_sums
        metric_sums[f"loss/{name}"] = metric_sums.get(f"loss/{name}", 0.0) + share
    return LossOutput(sum(weight * output.loss_sum for _, output, weight in outputs), outputs[0][1].count, metric_sums)


@torch.no_grad()
def metrics_with_reference(pairs: PairLogps, beta: float) -> dict[str, Tensor]:
    """Sums over pairs of the metrics that a run logs; rewards are b r, kl and entropy are estimates from the completion's own tokens."""
    kl = mean_of_sides(pairs, log_ratios(pairs)).sum()
    chosen_P, rejected_P = chosen_rejected(pairs, pairs.ref_P2)
    of_reference = {"logps/ref_chosen": chosen_P.sum(), "logps/ref_rejected": rejected_P.sum()}
    of_kl = {"objective/kl": kl, "objective/non_score_reward": -beta * kl}
    return metrics_of_rewards(pairs, beta * log_ratios(pairs)) | of_reference | of_kl


@torch.no_grad()
def metrics_of_rewards(pairs: PairLogps, reward_P2: Tensor) -> dict[str, Tensor]:
    """Sums over pairs of the metrics that need no reference."""
    chosen_P, rejected_P = chosen_rejected(pairs, reward_P2)
    chosen_logps_P, rejected_logps_P = chosen_rejected(pairs, pairs.policy_P2)
    chosen_length_P, rejected_length_P = chosen_rejected(pairs, pairs.length_P2)
    return {
        "rewards/chosen": chosen_P.sum(),
        "rewards/rejected": rejected_P.sum(),
        "rewards/accuracies": (chosen_P > rejected_P).float().sum(),
        "rewards/margins": (chosen_P - rejected_P).sum(),
        "logps/chosen": chosen_logps_P.sum(),
        "logps/rejected": rejected_logps_P.sum(),
        "length/chosen": chosen_length_P.sum(),
        "length/rejected": rejected_length_P.sum(),
        "objective/entropy": -mean_of_sides(pairs, pairs.policy_P2).sum(),
    }


def chosen_rejected(pairs: PairLogps, value_P2: Tensor) -> tuple[Tensor, Tensor]:
    """[P], [P]: values of the sides with preference at least 0.5, and of the others."""
    first_P, second_P = value_P2.unbind(1)
    first_wins_P = pairs.preference_P >= 0.5
    return torch.where(first_wins_P, first_P, second_P), torch.where(first_wins_P, second_P, first_P)


def mean_of_sides(pairs: PairLogps, value_P2: Tensor) -> Tensor:
    """[P]: mean over the completions that a pair has; an empty side is none."""
    return value_P2.sum(1) / (pairs.length_P2 > 0).sum(1).clamp(min=1)


def extra(pairs: PairLogps, name: str) -> Tensor:
    """[P]: a number that every pair has to bring; ValueError where it does not."""
    if name not in pairs.extras_P:
        raise ValueError(f"the loss needs {name} of every pair, and the pairs have {sorted(pairs.extras_P) or 'no extras'}; give it with the rows")
    return pairs.extras_P[name]


def length_desensitized(pairs: PairLogps, ld_alpha: float) -> PairLogps:
    """The pairs with every token after the shorter side's length weighed by `ld_alpha`, of policy and reference: LD-DPO, arXiv 2409.06411.

    The tokens of a completion are in their order.
    """
    if ld_alpha == 1:
        return pairs
    length_C = pairs.length_P2.view(-1).long()
    order_K = torch.argsort(pairs.cell_K, stable=True)
    start_C = length_C.cumsum(0) - length_C
    position_K = torch.empty_like(order_K)
    position_K[order_K] = torch.arange(len(order_K), device=order_K.device) - start_C[pairs.cell_K[order_K]]
    shared_C = length_C.view(-1, 2).amin(1).repeat_interleave(2)
    weight_K = torch.where(position_K < shared_C[pairs.cell_K], 1.0, ld_alpha)
    return replace(pairs, policy_K=pairs.policy_K * weight_K, ref_K=pairs.ref_K * weight_K)


@torch.no_grad()
def weighted_by_policy(pairs: PairLogps) -> PairLogps:
    """The pairs with extra `weight`, how likely the policy is to have written them: WPO, arXiv 2406.11827 eq. 2.

    It is the product of both sides' exp(mean over tokens of log p_t - log sum_v p_t(v)^2); the tokens' extra `log_sum_sq` is that log of the sum,
    logsumexp(2 logits) - 2 logsumexp(logits).
    """
    alignment_P2 = per_token(pairs, pairs.sum_by_completion(pairs.policy_K - pairs.extras_K["log_sum_sq"]))
    weight_P = pairs.extras_P.get("weight", 1.0) * alignment_P2.sum(1).exp()
    return replace(pairs, extras_P={**pairs.extras_P, "weight": weight_P})
