"""Preference data from files: loaded and tokenised once, then dealt out by step and rank."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from transformers import PreTrainedTokenizerBase

from megapref.batch import PairBatch, TokenPair
from megapref.data.chat import RenderedRow, render, tokenize
from megapref.data.formats import Tie, preference_of
from megapref.data.mixture import step_rows
from megapref.data.packing import pair_tokens
from megapref.data.prompts import cut_prompt
from megapref.data.rows import BadRow, Location, SourceLike, bad_row_handler, check_any, read_sources


def load_pairs(
    sources: Sequence[SourceLike],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    truncation: str = "keep_end",
    pack_tokens: int | None = None,
    share_prompt: bool = True,
    ties: str = "error",
    on_bad_row: str = "error",
) -> tuple[list[TokenPair], dict[str, int]]:
    """All pairs of the sources in order, and how many rows were changed: `data/dropped_rows`, `data/truncated_rows`, `data/tied_rows`.

    Token ids are arrays, not lists, for memory's sake. Rows are cut as `truncate` says; one left with an empty side, or equal sides, is dropped.
    A pair that still takes more than `pack_tokens` in a pack is a bad row. `ties`: error | skip, for ranked rows that prefer neither side.
    """
    if ties not in ("error", "skip"):
        raise ValueError(f"ties={ties!r} is not known for preference rows; use error or skip")
    skipped: list[BadRow] = []
    tied: list[BadRow] = []
    on_bad = bad_row_handler(on_bad_row, skipped)

    def on_bad_or_tie(error: BadRow) -> None:
        (tied.append if isinstance(error, Tie) and ties == "skip" else on_bad)(error)

    def normalise(row: dict[str, Any], location: Location) -> RenderedRow:
        pair = preference_of(row, location)
        sides = (pair.chosen,) if pair.rejected is None else (pair.chosen, pair.rejected)
        return render(tokenizer, pair.prompt, sides, location, pair.extras)

    pairs: list[TokenPair] = []
    num_dropped = num_truncated = 0
    for row, prompt_ids, completions in tokenize(tokenizer, read_sources(sources, normalise, on_bad_or_tie)):
        try:
            limits = (max_length, max_prompt_length, max_completion_length)
            kept_prompt, kept = truncate(prompt_ids, completions, limits, truncation, row.location)
            pair = TokenPair(array("i", kept_prompt), *(array("i", ids) for ids in kept), extras=row.columns)
            _check_room(pair, pack_tokens, share_prompt, row.location)
        except BadRow as error:
            on_bad(error)
            continue
        if not all(kept) or (len(kept) == 2 and kept[0] == kept[1]):
            num_dropped += 1
            continue
        num_truncated += (kept_prompt, kept) != (prompt_ids, completions)
        pairs.append(pair)
    check_any(pairs, sources, skipped)
    return pairs, {"data/dropped_rows": num_dropped + len(skipped), "data/truncated_rows": num_truncated, "data/tied_rows": len(tied)}


def truncate(
    prompt_ids: list[int],
    completions: list[list[int]],
    limits: tuple[int | None, int | None, int | None],
    truncation: str,
    location: Location,
) -> tuple[list[int], list[list[int]]]:
    """Prompt and completions within `limits`: (tokens of prompt and one completion together, of the prompt, of a completion).

    Completions lose their end. `keep_end` cuts the beginning of the prompt, to at least one token, to make room for the longest completion;
    `keep_start` keeps the beginning of prompt and completion, which may leave no completion token; `error` is a BadRow wherever it would cut.
    """
    max_length, max_prompt_length, max_completion_length = limits
    longest = max(len(ids) for ids in completions)
    if truncation == "error":
        if max_completion_length is not None and longest > max_completion_length:
            raise BadRow(location, f"completion: {longest} tokens, over data.max_completion_length={max_completion_length}")
        if max_length is not None and len(prompt_ids) + longest > max_length:
            raise BadRow(location, f"prompt and completion: {len(prompt_ids) + longest} tokens, over data.max_length={max_length}")
    completions = [ids[:max_completion_length] for ids in completions]
    prompt_ids = cut_prompt(prompt_ids, max_prompt_length, truncation, location)
    if max_length is not None:
        if truncation == "keep_end":
            longest = max(len(ids) for ids in completions)
            prompt_ids = cut_prompt(prompt_ids, max(1, max_length - longest), truncation, location)
        completions = [ids[: max(0, max_length - len(prompt_ids))] for ids in completions]
    return prompt_ids, completions


def _check_room(pair: TokenPair, pack_tokens: int | None, share_prompt: bool, location: Location) -> None:
    size = pair_tokens(pair, share_prompt=share_prompt)
    if pack_tokens is not None and size > pack_tokens:
        reason = f"the pair takes {size} tokens, more than pack.max_tokens={pack_tokens}"
        raise BadRow(location, f"{reason}; raise it or lower data.max_length")


def offline_pairs(
    pairs: Sequence[TokenPair],
    *,
    global_batch_size: int,
    rank: int,
    num_ranks: int,
    seed: int,
    start_step: int = 0,
    shuffle: bool = True,
    counts: Mapping[str, int] | None = None,
) -> Iterator[PairBatch]:
    """Without end, a PairBatch per step: this data-parallel rank's strided share of its `global_batch_size` pairs; `counts` go with the first."""
    for step in count(start_step):
        rows = step_rows(len(pairs), global_batch_size=global_batch_size, step=step, seed=seed, shuffle=shuffle)
        sums = {name: (float(number), 1.0) for name, number in (counts or {}).items()} if step == start_step else {}
        yield PairBatch(step, [pairs[i] for i in rows[rank::num_ranks]], sums)
