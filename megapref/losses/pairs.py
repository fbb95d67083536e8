"""Losses of a pack's pairs, each pair by itself. Notation in `losses`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu, sigmoid

from megapref.batch import LossOutput, PairLogps
from megapref.losses.terms import (
    Divergence,
    Fraction,
    Positive,
    bernoulli_kl,
    chosen_rejected,
    extra,
    log_ratios,
    mean_of_sides,
    metrics_of_rewards,
    metrics_with_reference,
    needing,
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
    """-LS(b (z_w / n_w - z_l / n_l)): length-averaged DPO; `centered` as in `terms.scores`."""
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
    """(d - 1 / (2 b))^2: IPO, arXiv 2310.12036 eq. 17; with `average_log_probs` d is of per-token means, `centered` as in `terms.scores`."""
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
    return preference_loss(pairs, lambda win, lose: -logsigmoid(z_P2[:, win]) - (logsigmoid(-z_P2[:, win]) + logsigmoid(-z_P2[:, lose])) / 2, beta)


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


@needing(lambda params: {"mean_log_ratio"} if params.get("running_delta") else ())
def bco_pair(
    pairs: PairLogps,
    *,
    beta: Positive = 0.1,
    running_delta: bool = False,
    f_divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> LossOutput:
    """-LS(b z_w - delta) - LS(-(b z_l - delta)): BCO, arXiv 2404.04656.

    delta is 0; with `running_delta` b times the pairs' extra `mean_log_ratio`, the mean of r over both sides of all pairs of the steps before.
    """
    z_P2 = beta * scores(pairs, f_divergence, alpha)
    if running_delta:
        z_P2 = z_P2 - beta * extra(pairs, "mean_log_ratio")[:, None]
    return preference_loss(pairs, lambda win, lose: -logsigmoid(z_P2[:, win]) - logsigmoid(-z_P2[:, lose]), beta)


def sppo_hard(pairs: PairLogps, *, beta: Positive = 0.1, f_divergence: Divergence = "reverse_kl", alpha: float = 0.5) -> LossOutput:
    """(z_w - 1 / (2 b))^2 + (z_l + 1 / (2 b))^2: SPPO with hard labels, arXiv 2405.00675 eq. 4.7."""
    z_P2 = scores(pairs, f_divergence, alpha)
    return preference_loss(pairs, lambda win, lose: (z_P2[:, win] - 1 / (2 * beta)) ** 2 + (z_P2[:, lose] + 1 / (2 * beta)) ** 2, beta)


def apo_zero(pairs: PairLogps, *, beta: Positive = 0.1) -> LossOutput:
    """1 - s(b r_w) + s(b r_l): chosen up, rejected down, arXiv 2408.06266 eq. 7."""
    r_P2 = beta * log_ratios(pairs)
    return preference_loss(pairs, lambda win, lose: sigmoid(-r_P2[:, win]) + sigmoid(r_P2[:, lose]), beta)


def apo_down(pairs: PairLogps, *, beta: Positive = 0.1, f_divergence: Divergence = "reverse_kl", alpha: float = 0.5) -> LossOutput:
    """s(b r_w) + 1 - s(b d): chosen down, rejected further down, arXiv 2408.06266 eq. 8."""
    r_P2, z_P2 = beta * log_ratios(pairs), beta * scores(pairs, f_divergence, alpha)
    return preference_loss(pairs, lambda win, lose: sigmoid(r_P2[:, win]) + sigmoid(z_P2[:, lose] - z_P2[:, win]), beta)


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

    def margin(win: int, lose: int) -> Tensor:
        return beta * (z_P2[:, win] - z_P2[:, lose] - shortfall_P2[:, win])

    def penalty(win: int, lose: int) -> Tensor:
        return -(1 - label_smoothing) * logsigmoid(margin(win, lose)) - label_smoothing * logsigmoid(-margin(win, lose))

    return preference_loss(pairs, penalty, beta)


@reference_free
def simpo(pairs: PairLogps, *, beta: Positive = 2.0, gamma: float = 1.0) -> LossOutput:
    """-LS(b (lp_w / n_w - lp_l / n_l) - gamma): SimPO, arXiv 2405.14734 eq. 6. Rewards are b lp / n."""
    reward_P2 = beta * per_token(pairs, pairs.policy_P2)
    loss_P = weigh_readings(pairs, of_margin(reward_P2, lambda d_P: -logsigmoid(d_P - gamma)))
    return total(pairs, loss_P, metrics_of_rewards(pairs, reward_P2))


@reference_free
def cpo(
    pairs: PairLogps,
    *,
    beta: Positive = 0.1,
    label_smoothing: Fraction = 0.0,
    cpo_alpha: float = 1.0,
    sft_average_log_probs: bool = True,
) -> LossOutput:
    """-(1 - eps) LS(b (lp_w - lp_l)) - eps LS(-b (lp_w - lp_l)) + cpo_alpha NLL(w): CPO, arXiv 2401.08417 eq. 5.

    NLL is the token mean, or the sum without `sft_average_log_probs`. Rewards are b lp.
    """
    reward_P2 = beta * pairs.policy_P2
    nll_P2 = -(per_token(pairs, pairs.policy_P2) if sft_average_log_probs else pairs.policy_P2)
    contrast_P = weigh_readings(pairs, of_margin(reward_P2, lambda d_P: -logsigmoid(d_P)), label_smoothing)
    likelihood_P = weigh_readings(pairs, lambda win, lose: nll_P2[:, win])
    return total(pairs, contrast_P + cpo_alpha * likelihood_P, metrics_of_rewards(pairs, reward_P2))


@reference_free
def orpo(pairs: PairLogps, *, beta: Positive = 0.1) -> LossOutput:
    """-p_w - b LS(log odds(w) - log odds(l)), p = lp / n, log odds = p - log(1 - exp(p)): ORPO, arXiv 2403.07691 eq. 6. Rewards are b p."""
    # A completion that the policy is certain of has infinite odds.
    mean_P2 = per_token(pairs, pairs.policy_P2).clamp(max=-1e-6)
    odds_P2 = mean_P2 - torch.log(-torch.expm1(mean_P2))

    def penalty(win: int, lose: int) -> Tensor:
        return -mean_P2[:, win] - beta * logsigmoid(odds_P2[:, win] - odds_P2[:, lose])

    return total(pairs, weigh_readings(pairs, penalty), metrics_of_rewards(pairs, beta * mean_P2))


@reference_free
def sft(pairs: PairLogps, *, average_log_probs: bool = True) -> LossOutput:
    """-lp_w / n_w, or -lp_w without `average_log_probs`: negative log-likelihood of the chosen side; the rejected side may be empty."""
    nll_P2 = -(per_token(pairs, pairs.policy_P2) if average_log_probs else pairs.policy_P2)
    with torch.no_grad():
        metric_sums = {
            "logps/chosen": chosen_rejected(pairs, pairs.policy_P2)[0].sum(),
            "objective/entropy": -mean_of_sides(pairs, pairs.policy_P2).sum(),
        }
    return total(pairs, chosen_rejected(pairs, nll_P2)[0], metric_sums)
