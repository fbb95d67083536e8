"""Prompts for the methods that sample: loaded and tokenised once, then dealt out by step and rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from megapref.batch import Prompt
from megapref.data.chat import RenderedRow, render, tokenize
from megapref.data.formats import prompt_of
from megapref.data.mixture import Rows, rows_of, step_rows
from megapref.data.rows import BadRow, Location, bad_row_handler
from megapref.data.source import Filtered, SourceLike, check_any, check_filter, read_source


def load_prompts(
    sources: Sequence[SourceLike],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None = None,
    truncation: str = "keep_end",
    max_new_tokens: int | None = None,
    room: int | None = None,
    max_length: int | None = None,
    on_bad_row: str = "error",
    dropped: list[BadRow] | None = None,
) -> tuple[Rows, dict[str, int]]:
    """All prompts of the sources in order, and how many rows were changed: `data/dropped_rows`, `data/filtered_rows`, `data/truncated_rows`, and
    `data/shortened_rows`, whose completions have less than `max_new_tokens` left of `max_length`.

    A prompt of more than `max_prompt_length` tokens is cut to its end or start, or is a bad row with `truncation="error"`.
    A prompt that is still over `room`, the tokens that a pack has left beside two completions, is a bad row, and so is one that leaves no token of
    `max_length`, the most of a prompt with its completion. A source's `filter_length` leaves out what is long beside `max_new_tokens`.
    `dropped` is filled with the reasons of all rows that are left out.
    """
    dropped = [] if dropped is None else dropped
    on_bad = bad_row_handler(on_bad_row, dropped)

    def normalise(row: dict[str, Any], location: Location) -> RenderedRow:
        return render(tokenizer, prompt_of(row, location), (), location, row)

    prompts: list[Prompt] = []
    ends: list[int] = []
    num_truncated = num_shortened = 0
    for source in sources:
        for row, ids, _, _ in tokenize(tokenizer, read_source(source, normalise, on_bad)):
            try:
                check_filter(source, ids, max_new_tokens, row.location)
                kept = cut_prompt(ids, max_prompt_length, truncation, row.location)
                if room is not None and len(kept) > room:
                    reason = f"prompt: {len(kept)} tokens, but a pack has room for {room} beside two completions; raise pack.max_tokens"
                    raise BadRow(row.location, f"{reason}, lower generation.max_new_tokens or set data.max_prompt_length")
                if max_length is not None and len(kept) >= max_length:
                    reason = f"prompt: {len(kept)} tokens leave none of {max_length} (data.max_length, or the model's positions) for a completion"
                    raise BadRow(row.location, f"{reason}; set data.max_prompt_length to cut it")
            except Filtered as error:
                dropped.append(error)
            except BadRow as error:
                on_bad(error)
            else:
                num_truncated += len(kept) < len(ids)
                num_shortened += max_length is not None and max_new_tokens is not None and len(kept) + max_new_tokens > max_length
                prompts.append(Prompt(kept, row.prompt, row.columns, index=len(prompts)))
        ends.append(len(prompts))
    check_any(prompts, sources, dropped)
    num_filtered = sum(isinstance(error, Filtered) for error in dropped)
    counts = {"data/dropped_rows": len(dropped) - num_filtered, "data/filtered_rows": num_filtered, "data/truncated_rows": num_truncated}
    counts |= {"data/shortened_rows": num_shortened}
    return rows_of(prompts, ends, sources), counts


def prompt_options(cfg: Any, pack_tokens: int, max_length: int | None) -> dict[str, Any]:
    """The options of `load_prompts` as a config has them; a pack has room for `pack_tokens`, a prompt with its completion for `max_length`."""
    options = {name: getattr(cfg.data, name) for name in ("max_prompt_length", "truncation", "on_bad_row")}
    new = cfg.generation.max_new_tokens
    room = pack_tokens - 2 * new
    return options | {"max_new_tokens": new, "room": room if cfg.pack.share_prompt else room // 2, "max_length": max_length}


def cut_prompt(ids: list[int], limit: int | None, truncation: str, location: Location) -> list[int]:
    """At most `limit` tokens of a prompt: its end, its start, or with `error` a BadRow where it is longer; BadRow also where it is empty."""
    if truncation not in ("keep_end", "keep_start", "error"):
        raise ValueError(f"data.truncation={truncation!r} is not known; use keep_end, keep_start or error")
    if not ids:
        raise BadRow(location, "prompt: has no token of its own, expected at least one, from which the completion's first is predicted")
    if limit is None or len(ids) <= limit:
        return ids
    if truncation == "error":
        raise BadRow(location, f"prompt: {len(ids)} tokens, expected at most {limit} (data.max_prompt_length; data.truncation=error)")
    return ids[-limit:] if truncation == "keep_end" else ids[:limit]


def prompt_batches(
    prompts: Rows, *, global_batch_size: int, rank: int, num_ranks: int, seed: int, start_step: int = 0, shuffle: bool = True
) -> Iterator[tuple[int, list[Prompt]]]:
    """Without end, each step with this data-parallel rank's strided share of its `global_batch_size` prompts."""
    for step in count(start_step):
        rows = step_rows(prompts.sizes, prompts.weights, global_batch_size=global_batch_size, step=step, seed=seed, shuffle=shuffle)
        yield step, [prompts[i] for i in rows[rank::num_ranks]]


def round_start(step: int, sync_every: int) -> int:
    """The step whose weights sample for step `step` (from 0): rounds of generation begin at the multiples of `sync_every`."""
    return step - step % sync_every


def rounds(
    batches: Iterable[tuple[int, list[Prompt]]], sync_every: int, total_steps: int | None = None
) -> Iterator[list[tuple[int, list[Prompt]]]]:
    """The batches of each round of generation: up to the next multiple of `sync_every`, or the end of the run."""
    batches = iter(batches)
    for step, prompts in batches:
        end = round_start(step, sync_every) + sync_every
        yield [(step, prompts), *islice(batches, min(end, total_steps or end) - step - 1)]
