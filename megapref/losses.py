"""Preference losses: pure functions `(PairLogps, *, params) -> LossOutput` of completion-token log-probabilities.

They see no parallelism: every sum is over the pairs of one pack, and the step divides by the global number of pairs.
Notation: w chosen, l rejected; lp and lr the summed log-probabilities of policy and reference, n the number of tokens of a completion;
r = lp - lr, z = r or its f-divergence transform (`loss_terms.scores`), d = z_w - z_l; b is beta, eps label_smoothing, s the logistic sigmoid,
LS log-sigmoid. Everything is computed in float32.
A preference p = P(first is better) weighs both readings of a pair: p loss(first, second) + (1 - p) loss(second, first).
Metrics, and losses of one side alone, call the side with p >= 0.5 chosen. A pair's extra `weight` multiplies its loss.

What a loss needs besides its pack is marked on the function: see `loss_terms.reference_free` and `loss_terms.batch_wide`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu, sigmoid

from megapref.batch import Loss, LossOutput, PairLogps
from megapref.loss_terms import (
    Divergence,
    Fraction,
    Positive,
    batch_wide,
    bernoulli_kl,
    chosen_rejected,
    extra,
    length_desensitized,
    log_ratios,
    mean_of_sides,
    metrics_of_rewards,
    metrics_with_reference,
    of_margin,
    per_token,
    preference_loss,
    reference_free,
    scores,
    total,
    weigh_readings,
    weighted_sum,
)


def dpo(
    pairs: PairLogps,
    *,
    beta: Positive = 0.1,
    label_smoothing: Fraction = 0.0,
    f_divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
    preference_loss_weight: float = 1.0,
    sft_loss_weight: float = 0.0,
    preference_average_log_probs: bool = False,
    sft_average_log_probs: bool = False,
) -> LossOutput:
    """-(1 - eps) LS(b d) - eps LS(-b d): DPO, arXiv 2305.18290 eq. 7; eps = label_smoothing > 0 is conservative DPO.

    The weights add the chosen side's negative log-likelihood; the `average` flags divide z, or that likelihood, by the number of tokens.
    """
    score_P2 = scores(pairs, f_divergence, alpha)
    if preference_average_log_probs:
        score_P2 = per_token(pairs, score_P2)
    output = preference_loss(pairs, of_margin(score_P2, lambda d_P: -logsigmoid(beta * d_P)), beta, label_smoothing)
    if preference_loss_weight == 1 and sft_loss_weight == 0:
        return output
    likelihood = sft(pairs, average_log_probs=sft_average_log_probs)
    return weighted_sum([("preference", output, preference_loss_weight), ("sft", likelihood, sft_loss_weight)])


def sigmoid_norm(
    pairs: PairLogps, *, beta: Positive = 0.1, f_divergence: Divergence = "reverse_kl", alpha: float = 0.5, centered: bool = False
) -> LossOutput:
    """-LS(b (z_w / n_w - z_l / n_l)): length-averaged DPO; `centered` as in `loss_terms.scores`."""
    score_P2 = per_token(pairs, scores(pairs, f_divergence, alpha, centered))
    return preference_loss(pairs, of_margin(score_P2, lambda d_P: -logsigmoid(beta * d_P)), beta)


def hinge(pairs: PairLogps, *, beta: Positive = 0.1, f_divergence: Divergence = "reverse_kl", alpha: float = 0.5) -> LossOutput:
    """max(0, 1 - b d): SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657."""
    return preference_loss(pairs, of_margin(scores(pairs, f_divergence, alpha), lambda d_P: relu(1 - beta * d_P)), beta)


def ipo(
    pairs: PairLogps,
    *,
    beta: Positive = 0.1,
    average_log_probs: bool = False,
    f_divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
    centered: bool = False,
) -> LossOutput:
    """(d - 1 / (2 b))^2: IPO, arXiv 2310.12036 eq. 17; with `average_log_probs` d is of per-token means, `centered` as in `loss_terms.scores`."""
    score_P2 = scores(pairs, f_divergence, alpha, centered)
    if average_log_probs:
        score_P2 = per_token(pairs, score_P2)
    return preference_loss(pairs, of_margin(score_P2, lambda d_P: (d_P - 1 / (2 * beta)) ** 2), beta)


def exo_pair(
    pairs: PairLogps,
    *,
    beta: Positive = 0.1,
    label_smoothing: Annotated[float, "> 0", "< 1"] = 1e-3,
    f_divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> LossOutput:
    """KL of Bernoulli(s(b d)) from Bernoulli(1 - eps): EXO, arXiv 2402.00856 eq. 16."""
    log_p, log_1mp = math.log1p(-label_smoothing), math.log(label_smoothing)
    return preference_loss(pairs, of_margin(scores(pairs, f_divergence, alpha), lambda d_P: bernoulli_kl(beta * d_P, log_p, log_1mp)), beta)


def nca_pair(pairs: PairLogps, *, beta: Positive = 0.1, f_divergence: Divergence = "reverse_kl", alpha: float = 0.5) -> LossOutput:
    """-LS(b z_w) - LS(-b z_w) / 2 - LS(-b z_l) / 2: NCA, arXiv 2402.05369."""
    z_P2 = beta * scores(pairs, f_divergence, alpha)
    return preference_loss(pairs, lambda w, l: -logsigmoid(z_P2[:, w]) - (logsigmoid(-z_P2[:, w]) + logsigmoid(-z_P2[:, l])) / 2, beta)


def robust(
    pairs: PairLogps,
    *,
    beta: Positive = 0.1,
    label_smoothing: Annotated[float, ">= 0", "< 0.5"] = 0.0,
    f_divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> LossOutput:
    """(-(1 - eps) LS(b d) + eps LS(-b d)) / (1 - 2 eps): unbiased if a share eps of labels is flipped, arXiv 2403.00409."""
    eps = label_smoothing

    def penalty(d_P: Tensor) -> Tensor:
        return (-(1 - eps) * logsigmoid(beta * d_P) + eps * logsigmoid(-beta * d_P)) / (1 - 2 * eps)

    return preference_loss(pairs, of_margin(scores(pairs, f_divergence, alpha), penalty), beta)


def bco_pair(
    pairs: PairLogps,
    *,
    beta: Positive = 0.1,
    running_delta: bool = False,
    f_divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> LossOutput:
    """-LS(b z_w - delta) - LS(-(b z_l - delta)): BCO, arXiv 2404.04656.

    delta is 0; with `running_delta` the pairs' extra `delta`, the mean of b r over both sides in the run so far.
    """
    z_P2 = beta * scores(pairs, f_divergence, alpha)
    if running_delta:
        z_P2 = z_P2 - extra(pairs, "delta")[:, None]
    return preference_loss(pairs, lambda w, l: -logsigmoid(z_P2[:, w]) - logsigmoid(-z_P2[:, l]), beta)


def sppo_hard(pairs: PairLogps, *, beta: Positive = 0.1, f_divergence: Divergence = "reverse_kl", alpha: float = 0.5) -> LossOutput:
    """(z_w - 1 / (2 b))^2 + (z_l + 1 / (2 b))^2: SPPO with hard labels, arXiv 2405.00675 eq. 4.7."""
    z_P2 = scores(pairs, f_divergence, alpha)
    return preference_loss(pairs, lambda w, l: (z_P2[:, w] - 1 / (2 * beta)) ** 2 + (z_P2[:, l] + 1 / (2 * beta)) ** 2, beta)


def apo_zero(pairs: PairLogps, *, beta: Positive = 0.1) -> LossOutput:
    """1 - s(b r_w) + s(b r_l): chosen up, rejected down, arXiv 2408.06266 eq. 7."""
    r_P2 = beta * log_ratios(pairs)
    return preference_loss(pairs, lambda w, l: sigmoid(-r_P2[:, w]) + sigmoid(r_P2[:, l]), beta)


def apo_down(pairs: PairLogps, *, beta: Positive = 0.1, f_divergence: Divergence = "reverse_kl", alpha: float = 0.5) -> LossOutput:
    """s(b r_w) + 1 - s(b d): chosen down, rejected further down, arXiv 2408.06266 eq. 8."""
    r_P2, z_P2 = beta * log_ratios(pairs), beta * scores(pairs, f_divergence, alpha)
    return preference_loss(pairs, lambda w, l: sigmoid(r_P2[:, w]) + sigmoid(z_P2[:, l] - z_P2[:, w]), beta)


def discopop(
    pairs: PairLogps, *, beta: Positive = 0.1, tau: Positive = 0.05, f_divergence: Divergence = "reverse_kl", alpha: float = 0.5
) -> LossOutput:
    """(1 - m) (-LS(u)) + m exp(-u), u = b d, m = s(u / tau): DiscoPOP, arXiv 2406.08414 eq. 5."""

    def penalty(d_P: Tensor) -> Tensor:
        u_P = beta * d_P
        # m exp(-u) as one exponential: where exp(-u) overflows, m is 0 and the product would be NaN.
        return sigmoid(-u_P / tau) * -logsigmoid(u_P) + torch.exp(logsigmoid(u_P / tau) - u_P)

    return preference_loss(pairs, of_margin(scores(pairs, f_divergence, alpha), penalty), beta)


def rpo_sq(pairs: PairLogps, *, beta: Positive = 0.1, gt_reward_scale: float = 1.0) -> LossOutput:
    """(b (r_w - r_l) - G)^2, G = gt_reward_scale (score_w - score_l) of the pairs' ground-truth scores: RPO, arXiv 2406.11704."""
    return _rpo(pairs, beta, gt_reward_scale, lambda u_P, goal_P: (u_P - goal_P) ** 2)


def rpo_bwd_kl(pairs: PairLogps, *, beta: Positive = 0.1, gt_reward_scale: float = 1.0) -> LossOutput:
    """KL(p || q) of Bernoullis p = s(G), q = s(b (r_w - r_l)), G as in `rpo_sq`: RPO, arXiv 2406.11704."""
    return _rpo(pairs, beta, gt_reward_scale, lambda u_P, goal_P: bernoulli_kl(goal_P, logsigmoid(u_P), logsigmoid(-u_P)))


def rpo_fwd_kl(pairs: PairLogps, *, beta: Positive = 0.1, gt_reward_scale: float = 1.0) -> LossOutput:
    """KL(q || p), p and q as in `rpo_bwd_kl`: RPO, arXiv 2406.11704."""
    return _rpo(pairs, beta, gt_reward_scale, lambda u_P, goal_P: bernoulli_kl(u_P, logsigmoid(goal_P), logsigmoid(-goal_P)))


def _rpo(pairs: PairLogps, beta: float, gt_reward_scale: float, distance: Callable[[Tensor, Tensor], Tensor]) -> LossOutput:
    """The distance of reward margins to the ground truth's, the same whichever side is called chosen."""
    margin_P = beta * (log_ratios(pairs)[:, 0] - log_ratios(pairs)[:, 1])
    goal_P = gt_reward_scale * (extra(pairs, "score_first") - extra(pairs, "score_second"))
    return total(pairs, distance(margin_P, goal_P), metrics_with_reference(pairs, beta))


def dpop(
    pairs: PairLogps,
    *,
    beta: Positive = 0.1,
    dpop_lambda: Annotated[float, ">= 0"] = 50.0,
    label_smoothing: Fraction = 0.0,
    f_divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> LossOutput:
    """DPO of d - lambda max(0, lr_w - lp_w), which keeps the chosen side likely: DPO-Positive, arXiv 2402.13228 eq. 3."""
    z_P2, shortfall_P2 = scores(pairs, f_divergence, alpha), dpop_lambda * relu(-log_ratios(pairs))

    def margin(w: int, l: int) -> Tensor:
        return beta * (z_P2[:, w] - z_P2[:, l] - shortfall_P2[:, w])

    def penalty(w: int, l: int) -> Tensor:
        return -(1 - label_smoothing) * logsigmoid(margin(w, l)) - label_smoothing * logsigmoid(-margin(w, l))

    return preference_loss(pairs, penalty, beta)
