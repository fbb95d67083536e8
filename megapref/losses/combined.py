"""Weighted lists of losses, and what a loss needs of the run, whatever it is made of. Notation in `losses`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megapref.batch import Logps, Loss, LossOutput, UnpairedLogps, needs
from megapref.losses.terms import (
    EntropyMode,
    Fraction,
    entropy,
    length_desensitized,
    mean_of_sides,
    needing,
    needs_entropy,
    total,
    weighted_by_policy,
    weighted_sum,
)


def _needs(params: dict[str, Any]) -> set[str]:
    of_parts = set().union(*(needs(loss) for loss, _ in params["losses"]))
    return of_parts | ({"log_sum_sq"} if params.get("weigh_by_policy") else set()) | needs_entropy(params)


@needing(_needs)
def combine(
    pairs: Logps,
    *,
    losses: list[tuple[Loss, float]],
    ld_alpha: Fraction = 1.0,
    weigh_by_policy: bool = False,
    entropy_regularization: float = 0.0,
    entropy_mode: EntropyMode = "full_vocab",
) -> LossOutput:
    """The weighted sum of losses, given as (loss with its parameters bound, weight).

    `ld_alpha` < 1 weighs the tokens after the shorter side's length: LD-DPO, arXiv 2409.06411. `weigh_by_policy` weighs pairs by how likely the
    policy is to have written them: WPO, arXiv 2406.11827. `entropy_regularization` times the `terms.entropy` of a completion, the mean of a pair's
    two, is subtracted. The share of each loss is metric loss/<name>.
    """
    if not losses:
        raise ValueError("losses=[] sums nothing; list {function, weight, params} of at least one loss")
    if ld_alpha != 1 and any(hasattr(part, "statistics") for loss, _ in losses for part in parts(loss)):
        raise ValueError(f"ld_alpha={ld_alpha} is not defined for losses that sort the global batch (aot, aot_unpaired); use ld_alpha=1")
    if entropy_regularization and isinstance(pairs, UnpairedLogps):
        raise ValueError(f"entropy_regularization={entropy_regularization} is defined for losses of pairs; use entropy_regularization=0")
    untouched = pairs
    if weigh_by_policy:
        pairs = weighted_by_policy(pairs)
    if ld_alpha != 1:
        pairs = length_desensitized(pairs, ld_alpha)
    outputs = [(getattr(loss, "func", loss).__name__, loss(pairs), weight) for loss, weight in losses]
    if entropy_regularization:
        bonus_P = mean_of_sides(untouched, entropy(untouched, entropy_mode))
        outputs.append(("entropy", total(untouched, bonus_P, {}), -entropy_regularization))
    return weighted_sum(outputs)


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


def is_first_only(loss: Loss) -> bool:
    """Whether a loss trains on the first completion alone: all of its parts do."""
    return all(getattr(part, "first_only", False) for part in parts(loss))


def needs_reference(loss: Loss) -> bool:
    """Whether any part of a loss compares with a reference; a function that is not marked `reference_free` does."""
    return not all(getattr(part, "reference_free", False) for part in parts(loss))
