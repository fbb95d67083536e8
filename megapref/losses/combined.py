"""Weighted lists of losses, and what a loss needs of the run, whatever it is made of. Notation in `losses`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megapref.batch import Logps, Loss, LossOutput, needs
from megapref.losses.terms import Fraction, length_desensitized, needing, weighted_by_policy, weighted_sum


def _needs(params: dict[str, Any]) -> set[str]:
    of_parts = set().union(*(needs(loss) for loss, _ in params["losses"]))
    return of_parts | ({"log_sum_sq"} if params.get("weigh_by_policy") else set())


@needing(_needs)
def combine(pairs: Logps, *, losses: list[tuple[Loss, float]], ld_alpha: Fraction = 1.0, weigh_by_policy: bool = False) -> LossOutput:
    """The weighted sum of losses, given as (loss with its parameters bound, weight).

    `ld_alpha` < 1 weighs the tokens after the shorter side's length: LD-DPO, arXiv 2409.06411. `weigh_by_policy` weighs pairs by how likely the
    policy is to have written them: WPO, arXiv 2406.11827. The share of each loss is metric loss/<name>.
    """
    if not losses:
        raise ValueError("losses=[] sums nothing; list {function, weight, params} of at least one loss")
    if ld_alpha != 1 and any(hasattr(part, "statistics") for loss, _ in losses for part in parts(loss)):
        raise ValueError(f"ld_alpha={ld_alpha} is not defined for losses that sort the global batch (aot, aot_unpaired); use ld_alpha=1")
    if weigh_by_policy:
        pairs = weighted_by_policy(pairs)
    if ld_alpha != 1:
        pairs = length_desensitized(pairs, ld_alpha)
    return weighted_sum([(getattr(loss, "func", loss).__name__, loss(pairs), weight) for loss, weight in losses])


def parts(loss: Loss) -> list[Callable[..., LossOutput]]:
    """The functions that a loss with its parameters bound is made of: its own, or those of a weighted list."""
    function, bound = getattr(loss, "func", loss), getattr(loss, "keywords", {})
    return [part for listed, _ in bound["losses"] for part in parts(listed)] if function is combine else [function]


def is_of_completions(loss: Loss) -> bool:
    """Whether a loss is of single labelled completions. ValueError for a list that has both kinds."""
    kinds = {getattr(part, "of_completions", False) for part in parts(loss)}
    if len(kinds) > 1:
        raise ValueError("losses: some are of pairs and some of single completions; list losses of one kind")
    return kinds == {True}


def needs_reference(loss: Loss) -> bool:
    """Whether any part of a loss compares with a reference; a function that is not marked `reference_free` does."""
    return not all(getattr(part, "reference_free", False) for part in parts(loss))
