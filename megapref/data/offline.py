"""Preference data from files: loaded and tokenised once, then dealt out by step and rank."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count
from typing import Any

from transformers import PreTrainedTokenizerBase

from megapref.batch import PairBatch, TokenCompletion, TokenPair
from megapref.data import ledger
from megapref.data.chat import RenderedRow, TokenizedRow, render, tokenize
from megapref.data.formats import Tie, preferences_of, unpaired_of
from megapref.data.mixture import Rows, rows_of, step_rows
from megapref.data.packing import pair_tokens
from megapref.data.prompts import cut_prompt
from megapref.data.rows import BadRow, Location, OnBad, bad_row_handler
from megapref.data.source import Filtered, SourceLike, check_any, check_filter, read_source

Limits = tuple[int | None, int | None, int | None]
COUNTERS = ("data/dropped_rows", "data/filtered_rows", "data/truncated_rows", "data/tied_rows")


class Emptied(BadRow):
    """A row of which truncation left nothing to train on."""

    remedy = "raise data.max_length, data.max_prompt_length or data.max_completion_length"


def load_pairs(
    sources: Sequence[SourceLike], tokenizer: PreTrainedTokenizerBase, *, dropped: list[BadRow] | None = None, **options: Any
) -> tuple[Rows, dict[str, int]]:
    """All pairs of the sources in order, read with the `options` of `read_pairs`, and how many rows were changed: `COUNTERS`.

    `dropped` is filled with the reasons of all rows that are left out. Extras that not every pair has are left out of all.
    """
    dropped = [] if dropped is None else dropped
    pairs: list[TokenPair] | list[TokenCompletion] = []
    ends: list[int] = []
    num_truncated = 0
    for source in sources:
        for pair, is_cut in read_pairs(source, tokenizer, dropped, **options):
            num_truncated += is_cut
            pairs.append(pair)
        ends.append(len(pairs))
    check_any(pairs, sources, dropped)
    counted = Counter(map(counter_of, dropped)) + Counter({"data/truncated_rows": num_truncated})
    return rows_of(with_common_extras(pairs), ends, sources), {name: counted[name] for name in COUNTERS}


def read_pairs(
    source: SourceLike,
    tokenizer: PreTrainedTokenizerBase,
    dropped: list[BadRow],
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    truncation: str = "keep_end",
    max_new_tokens: int | None = None,
    pack_tokens: int | None = None,
    share_prompt: bool = True,
    pairing: str = "best_worst",
    ties: str = "error",
    train_on: str = "final",
    on_bad_row: str = "error",
    unpaired: bool = False,
    arrange: Callable[[Iterator[RenderedRow]], Iterator[RenderedRow]] = iter,
) -> Iterator[tuple[TokenPair | TokenCompletion, bool]]:
    """The pairs of one source as they are read, each with whether it was cut; the reasons of rows that are left out are appended to `dropped`.

    Token ids are arrays, not lists, for memory's sake. Rows are cut as `truncate` says; one left with nothing to train on is dropped.
    A pair that still takes more than `pack_tokens` in a pack is a bad row. `pairing` and `ties` (error | skip) are for rows that rank,
    `train_on` for completions of several messages; a source's `filter_length` leaves out what is long beside `max_new_tokens`.
    With `unpaired` the rows are `TokenCompletion`s: of rows with a label, and of both sides of preference rows. `arrange` may change the order.
    """
    on_bad = bad_row_handler(on_bad_row, dropped)
    render_rows = _render_completions if unpaired else _render_pairs
    normalise = partial(render_rows, tokenizer, pairing, train_on, bad_row_handler(ties, dropped, "data.ties"), dropped.append)
    for row in tokenize(tokenizer, arrange(chain.from_iterable(read_source(source, normalise, on_bad)))):
        try:
            check_filter(source, row.prompt_ids, max_new_tokens, row.row.location)
            pair, is_cut = _pair(row, (max_length, max_prompt_length, max_completion_length), truncation)
            _check_room(pair, pack_tokens, share_prompt, row.row.location)
        except (Filtered, Emptied) as error:
            dropped.append(error)
        except BadRow as error:
            on_bad(error)
        else:
            yield (_completion(pair) if unpaired else pair), is_cut


def counter_of(error: BadRow) -> str:
    """Under which of the `COUNTERS` a row counts that is left out."""
    return {Filtered: "data/filtered_rows", Tie: "data/tied_rows"}.get(type(error), "data/dropped_rows")


def pair_options(cfg: Any, pack_tokens: int) -> dict[str, Any]:
    """The options of `read_pairs` as a config has them; `pack_tokens` is what a pack has room for."""
    names = ("max_length", "max_prompt_length", "max_completion_length", "truncation", "pairing", "ties", "train_on", "on_bad_row")
    options = {name: getattr(cfg.data, name) for name in names}
    new = cfg.generation.max_new_tokens
    return options | {"max_new_tokens": new, "pack_tokens": pack_tokens, "share_prompt": cfg.pack.share_prompt}


def _render_pairs(
    tokenizer: PreTrainedTokenizerBase, pairing: str, train_on: str, on_tie: OnBad, on_undecided: OnBad, row: dict[str, Any], location: Location
) -> list[RenderedRow]:
    if ledger.is_row(row):
        return ledger.rendered_pair(tokenizer, row, location, pairing, on_undecided)
    rendered = []
    for pair in preferences_of(row, location, pairing=pairing, on_tie=on_tie):
        sides = (pair.chosen,) if pair.rejected is None else (pair.chosen, pair.rejected)
        rendered.append(render(tokenizer, pair.prompt, sides, location, pair.extras, train_on))
    return rendered


def _render_completions(
    tokenizer: PreTrainedTokenizerBase, pairing: str, train_on: str, on_tie: OnBad, on_undecided: OnBad, row: dict[str, Any], location: Location
) -> list[RenderedRow]:
    """Each completion by itself, with its label; the sides of a pair are a desirable and an undesirable one."""
    if ledger.is_row(row):
        return ledger.rendered_completions(tokenizer, row, location, pairing, on_undecided)
    if row.get("label") is not None:
        labelled = unpaired_of(row, location)
        found = [(labelled.prompt, labelled.completion, labelled.desirable)]
    else:
        pairs = preferences_of(row, location, pairing=pairing, on_tie=on_tie)
        found = [(p.prompt, side, side is p.chosen) for p in pairs for side in (p.chosen, p.rejected) if side is not None]
    return [render(tokenizer, prompt, (side,), location, {"desirable": float(good)}, train_on) for prompt, side, good in found]


def _completion(pair: TokenPair) -> TokenCompletion:
    return TokenCompletion(pair.prompt_ids, pair.first_ids, bool(pair.extras["desirable"]), pair.first_mask)


def mismatched(completions: Sequence[TokenCompletion], limit: int) -> list[TokenCompletion]:
    """Each prompt of a step with the completion of the next row that has another prompt, or of the next row where all have the same.

    Its end is cut where the two are over `limit` tokens. A pure function of the step's rows, so every rank makes the same. ValueError for one alone.
    """
    size = len(completions)
    if size < 2:
        raise ValueError("a loss with a baseline from other prompts (losses:kto) needs two completions, also of a validation set; there is one")
    prompts = [tuple(row.prompt_ids) for row in completions]
    others = []
    for i, row in enumerate(completions):
        following = [(i + shift) % size for shift in range(1, size)]
        other = completions[next((j for j in following if prompts[j] != prompts[i]), following[0])]
        room = max(1, limit - len(row.prompt_ids))
        mask = None if other.mask is None else other.mask[:room]
        others.append(TokenCompletion(row.prompt_ids, other.ids[:room], row.desirable, mask))
    return others


def _pair(row: TokenizedRow, limits: Limits, truncation: str) -> tuple[TokenPair, bool]:
    """The row as a pair, and whether it was cut; Emptied where nothing is left to train on."""
    location = row.row.location
    prompt_ids, kept = truncate(row.prompt_ids, row.completion_ids, limits, truncation, location)
    masks = [mask if mask is None else array("b", mask[: len(ids)]) for mask, ids in zip(row.masks, kept, strict=True)]
    if not all(ids if mask is None else any(mask) for mask, ids in zip(masks, kept, strict=True)):
        raise Emptied(location, "completion: no token is left that could be trained")
    if len(kept) == 2 and kept[0] == kept[1] and row.row.ids is None:  # a run may well have sampled the same twice
        raise Emptied(location, "completions: they differ only in what was cut off")
    pair = TokenPair(array("i", prompt_ids), *(array("i", ids) for ids in kept), preference=row.row.preference, extras=row.row.columns)
    masks = dict(zip(("first_mask", "second_mask"), masks, strict=False))
    return replace(pair, **masks), (prompt_ids, kept) != (row.prompt_ids, row.completion_ids)


def with_common_extras(pairs: list[Any]) -> list[Any]:
    """The pairs with the extras that all of them have: a pack needs the same of all; a loss that misses one says so."""
    if not isinstance(pairs[0], TokenPair):
        return pairs
    names = set.intersection(*(set(pair.extras) for pair in pairs))
    return [pair if len(pair.extras) == len(names) else replace(pair, extras={n: pair.extras[n] for n in sorted(names)}) for pair in pairs]


def truncate(
    prompt_ids: list[int],
    completions: list[list[int]],
    limits: Limits,
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
    pairs: Rows,
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
        rows = step_rows(pairs.sizes, pairs.weights, global_batch_size=global_batch_size, step=step, seed=seed, shuffle=shuffle)
        sums = {name: (float(number), 1.0) for name, number in (counts or {}).items()} if step == start_step else {}
        yield PairBatch(step, [pairs[i] for i in rows[rank::num_ranks]], sums)
