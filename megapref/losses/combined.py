"""Weighted lists of losses, and what a loss needs of the run, whatever it is made of. Notation in `losses`."""

from __future__ import annotations

from collections.abc import Callable

from megapref.batch import Loss, LossOutput, PairLogps
from megapref.losses.terms import Fraction, length_desensitized, weighted_sum


def combine(pairs: PairLogps, *, losses: list[tuple[Loss, float]], ld_alpha: Fraction = 1.0) -> LossOutput:
    """The weighted sum of losses, given as (loss with its parameters bound, weight).

    `ld_alpha` < 1 weighs the tokens after the shorter side's length: LD-DPO, arXiv 2409.06411. The share of each loss is metric loss/<name>.
    """
    if not losses:
        raise ValueError("losses=[] sums nothing; list {function, weight, params} of at least one loss")
    if ld_alpha != 1 and any(hasattr(part, "statistics") for loss, _ in losses for part in parts(loss)):
        raise ValueError(f"ld_alpha={ld_alpha} is not defined for losses that sort the global batch (aot, aot_unpaired); use ld_alpha=1")
    pairs = length_desensitized(pairs, ld_alpha)
    return weighted_sum([(getattr(loss, "func", loss).__name__, loss(pairs), weight) for loss, weight in losses])


def parts(loss: Loss) -> list[Callable[..., LossOutput]]:
    """The functions that a loss with its parameters bound is made of: its own, or those of a weighted list."""
    function, bound = getattr(loss, "func", loss), getattr(loss, "keywords", {})
    return [part for listed, _ in bound["losses"] for part in parts(listed)] if function is combine else [function]


def needs_reference(loss: Loss) -> bool:
    """Whether any part of a loss compares with a reference; a function that is not marked `reference_free` does."""
    return not all(getattr(part, "reference_free", False) for part in parts(loss))
