"""Losses that compare the distributions of the whole global batch, not its pairs one by one. Notation in `losses`.

Their functions are marked with `terms.batch_wide`: what a pair is matched with is found first, over the pairs of all packs and ranks,
and given to it as extras; a constant, as sorting has no gradient. So each pack is trained by itself, and its gradient is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megapref.batch import LossOutput, PairLogps
from megapref.losses.terms import Fraction, Positive, batch_wide, chosen_rejected, extra, log_ratios, metrics_with_reference, total


def _gaps(pairs: PairLogps) -> Tensor:
    gaps = [chosen - rejected for chosen, rejected in (chosen_rejected(pairs, pairs.policy_P2), chosen_rejected(pairs, pairs.ref_P2))]
    return torch.stack(gaps, dim=1)


def _match_gaps(gaps_G2: Tensor) -> dict[str, Tensor]:
    return {"aot_reference_gap": _of_equal_rank(gaps_G2[:, 0], gaps_G2[:, 1])}


def _ratios(pairs: PairLogps) -> Tensor:
    return torch.stack(chosen_rejected(pairs, log_ratios(pairs)), dim=1)


def _match_ratios(ratios_G2: Tensor) -> dict[str, Tensor]:
    chosen_G, rejected_G = ratios_G2.unbind(1)
    return {"aot_rejected_ratio": _of_equal_rank(chosen_G, rejected_G), "aot_chosen_ratio": _of_equal_rank(rejected_G, chosen_G)}


def _of_equal_rank(values_G: Tensor, others_G: Tensor) -> Tensor:
    """[G]: for each value the other that has the same rank among the others."""
    matched_G = torch.empty_like(others_G)
    matched_G[torch.argsort(values_G, stable=True)] = torch.sort(others_G, stable=True).values
    return matched_G


@batch_wide(_gaps, _match_gaps)
def aot(pairs: PairLogps, *, beta: Positive = 0.1, label_smoothing: Fraction = 0.0) -> LossOutput:
    """-(1 - eps) LS(b g) - eps LS(-b g), g = sort(lp_w - lp_l) - sort(lr_w - lr_l) over the global batch: AOT, arXiv 2406.05882."""
    chosen_P, rejected_P = chosen_rejected(pairs, pairs.policy_P2)
    loss_P = _smoothed(beta * (chosen_P - rejected_P - extra(pairs, "aot_reference_gap")), label_smoothing)
    return total(pairs, loss_P, metrics_with_reference(pairs, beta))


@batch_wide(_ratios, _match_ratios)
def aot_unpaired(pairs: PairLogps, *, beta: Positive = 0.1, label_smoothing: Fraction = 0.0) -> LossOutput:
    """As `aot`, with g = sort(r_w) - sort(r_l) over the global batch: AOT unpaired, arXiv 2406.05882."""
    chosen_P, rejected_P = chosen_rejected(pairs, log_ratios(pairs))
    of_chosen_P = _smoothed(beta * (chosen_P - extra(pairs, "aot_rejected_ratio")), label_smoothing)
    of_rejected_P = _smoothed(beta * (extra(pairs, "aot_chosen_ratio") - rejected_P), label_smoothing)
    # Each term of the global sum is here once with the chosen side's gradient, once with the rejected side's: both gradients, half the value.
    twice_P = of_chosen_P + of_rejected_P
    return total(pairs, twice_P - twice_P.detach() / 2, metrics_with_reference(pairs, beta))


def _smoothed(u_P: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * logsigmoid(u_P) - label_smoothing * logsigmoid(-u_P)
