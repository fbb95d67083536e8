"""The training steps that `tools/benchmark.py --suite gpu` measures: what is trained, with which reference, in which layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from benchmark_figures import Work

from megapref import losses
from megapref.batch import Loss, ModelSpec, TokenPair

LAYOUTS = ("shared", "packed", "padded")


@dataclass(frozen=True)
class Case:
    """A kind of training step: its name, its pairs as they are laid out, what it has to do, its loss, whether a second model scores them."""

    name: str
    pairs: list[TokenPair]
    share_prompt: bool
    work: Work
    loss: Loss
    live: bool


def training_cases(spec: ModelSpec, pairs: list[TokenPair], modes: Sequence[str], layouts: Sequence[str]) -> list[Case]:
    """SFT on every completion by itself, DPO in every layout; the cases with a live reference come last."""
    completions = [TokenPair(pair.prompt_ids, side) for pair in pairs for side in (pair.first_ids, pair.second_ids)]
    guess = -math.log(spec.vocab_size)
    scored = [replace(pair, ref_logps=[guess] * (len(pair.first_ids) + len(pair.second_ids))) for pair in pairs]
    kinds = {"sft": (completions, losses.sft, "sft"), "dpo-cached": (scored, partial(losses.dpo, beta=0.1), "dpo cached")}
    kinds["dpo-live"] = (pairs, partial(losses.dpo, beta=0.1), "dpo live")
    cases = []
    for mode in (mode for mode in kinds if mode in modes):
        rows, loss, name = kinds[mode]
        for layout in (layout for layout in LAYOUTS if layout in layouts and not (mode == "sft" and layout == "shared")):
            work = Work.of(spec, rows, layout == "shared")
            laid_out = padded(rows) if layout == "padded" else rows
            cases.append(Case(f"{name}, {layout}", laid_out, layout == "shared", work, loss, mode == "dpo-live"))
    return cases


def padded(pairs: list[TokenPair]) -> list[TokenPair]:
    """The pairs with untrained tokens behind every completion, so that all sequences are as long as the longest."""
    longest = max(len(pair.prompt_ids) + len(side) for pair in pairs for side in (pair.first_ids, pair.second_ids))

    def filled(pair: TokenPair, side: Sequence[int]) -> tuple[list[int], list[bool]]:
        more = longest - len(pair.prompt_ids) - len(side)
        return [*side, *[0] * more], [True] * len(side) + [False] * more

    def whole(pair: TokenPair) -> TokenPair:
        first, first_mask = filled(pair, pair.first_ids)
        second, second_mask = filled(pair, pair.second_ids) if pair.second_ids else ([], [])
        return replace(pair, first_ids=first, second_ids=second, first_mask=first_mask, second_mask=second_mask)

    return [whole(pair) for pair in pairs]
