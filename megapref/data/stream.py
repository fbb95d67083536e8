"""Pairs of sources that are larger than memory: read, shuffled and tokenised while training goes on.

The sequence of pairs is a pure function of the files, the options and the seed. Every process goes through all of it and takes its share of each
step, so it depends neither on the number of ranks nor, as a resumed run goes through what was trained before, on where a run was stopped.
An epoch is one pass over the files: sources take turns while they last. With weights each source is drawn from in proportion, and begins anew
whenever it ends. Rows are shuffled in a buffer, so a row comes up near its place in the file; what is in memory is that buffer for each source,
the rows that are tokenised together, and the steps made ahead.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import batched, chain, count, islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megapref.batch import PairBatch, TokenCompletion, TokenPair
from megapref.data.offline import COUNTERS, counter_of, read_pairs, with_common_extras
from megapref.data.rows import BadRow, parquet_files
from megapref.data.source import SourceLike, check_any

Row = tuple[TokenPair | TokenCompletion, bool]  # and whether it was cut

STEPS_AHEAD = 4
FIRST_ROWS = 64  # of each source, that tell one stream from another


@dataclass(frozen=True)
class Stream:
    """What takes the place of `mixture.Rows` for sources that are not loaded."""

    sources: Sequence[SourceLike]
    tokenizer: PreTrainedTokenizerBase
    options: dict[str, Any]  # of offline.read_pairs
    buffer: int  # rows of each source that are held to be shuffled
    check: Callable[[list[Any]], None]  # raises where pairs cannot be trained on

    def read(self, number: int, dropped: Dropped, arrange: Callable = iter) -> Iterator[Row]:
        """One pass over a source."""
        return read_pairs(self.sources[number], self.tokenizer, dropped, **self.options, arrange=arrange)


class Dropped(list[BadRow]):
    """The reasons of rows that are left out, of which there is no end: all are counted, the first is kept."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def append(self, error: BadRow) -> None:
        """Counts it, and keeps it if it is the first."""
        if not self:
            super().append(error)
        self.counts[counter_of(error)] += 1

    def __len__(self) -> int:
        return self.counts.total()


def stream_pairs(
    stream: Stream, *, global_batch_size: int, rank: int, num_ranks: int, seed: int, start_step: int = 0, shuffle: bool = True
) -> Iterator[PairBatch]:
    """Without end, a PairBatch per step: this data-parallel rank's strided share of its pairs, and what was changed or left out so far.

    Steps are made ahead in a thread. ValueError for a bad row that is to stop the run, and where a source has no usable row.
    """
    batches = _batches(stream, global_batch_size, rank, num_ranks, seed, shuffle)
    return islice(ahead(batches, STEPS_AHEAD), start_step, None)


def digest_of(stream: Stream) -> str:
    """Tells streams apart: by the length of the files, what is taken from them and how, and their first pairs. ValueError as `stream_pairs`."""
    dropped = Dropped()
    first = chain.from_iterable(islice(stream.read(number, dropped), FIRST_ROWS) for number in range(len(stream.sources)))
    pairs = [pair for pair, _ in _nonempty(stream.sources, first, dropped)]
    stream.check(pairs)
    files = [replace(source, path=str(_size(source.path))) for source in stream.sources]
    return hashlib.sha256(repr((files, stream.options, stream.buffer, pairs)).encode()).hexdigest()[:16]


def shuffled[T](rows: Iterable[T], size: int, seed: str) -> Iterator[T]:
    """The rows in a random order, of which `size` are held: each next one is drawn from these, and the row read next takes its place."""
    rows, noise = iter(rows), random.Random(seed)
    held = list(islice(rows, size))
    for row in rows:
        drawn = noise.randrange(size)
        yield held[drawn]
        held[drawn] = row
    noise.shuffle(held)
    yield from held


def ahead[T](values: Iterator[T], number: int) -> Iterator[T]:
    """The values, of which `number` are made ahead by a thread; an error is raised where its value would have been."""
    with ThreadPoolExecutor(1) as thread:
        made = deque(thread.submit(next, values) for _ in range(number))
        while True:
            made.append(thread.submit(next, values))
            yield made.popleft().result()


def _batches(stream: Stream, size: int, rank: int, num_ranks: int, seed: int, shuffle: bool) -> Iterator[PairBatch]:
    dropped, num_truncated = Dropped(), 0
    for step, batch in enumerate(batched(_rows(stream, dropped, seed, shuffle), size)):
        pairs = with_common_extras([pair for pair, _ in batch])
        stream.check(pairs)
        num_truncated += sum(is_cut for _, is_cut in batch)
        counts = {name: dropped.counts[name] for name in COUNTERS} | {"data/truncated_rows": num_truncated}
        yield PairBatch(step, pairs[rank::num_ranks], {name: (float(number), 1.0) for name, number in counts.items()})


def _rows(stream: Stream, dropped: Dropped, seed: int, shuffle: bool) -> Iterator[Row]:
    """Epoch after epoch, without end."""

    def epoch_of(number: int, epoch: int) -> Iterator[Row]:
        return stream.read(number, dropped, partial(shuffled, size=stream.buffer, seed=f"{seed}, {number}, {epoch}") if shuffle else iter)

    def endless(numbers: Sequence[int]) -> Iterator[Row]:
        join = _in_turns if shuffle else chain.from_iterable
        for epoch in count():
            yield from _nonempty([stream.sources[i] for i in numbers], join([epoch_of(i, epoch) for i in numbers]), dropped)

    numbers = range(len(stream.sources))
    weights = [source.weight for source in stream.sources]
    return endless(numbers) if None in weights else _in_proportion([endless([i]) for i in numbers], weights)


def _in_turns[T](parts: list[Iterator[T]]) -> Iterator[T]:
    """One of each, as long as it lasts."""
    while parts:
        for part in list(parts):
            try:
                yield next(part)
            except StopIteration:
                parts.remove(part)


def _in_proportion[T](parts: list[Iterator[T]], weights: Sequence[float]) -> Iterator[T]:
    """Of endless parts always the one that is furthest behind its share."""
    taken = [0] * len(parts)
    while True:
        part = min(range(len(parts)), key=lambda i: (taken[i] + 0.5) / weights[i])
        taken[part] += 1
        yield next(parts[part])


def _nonempty(sources: Sequence[SourceLike], rows: Iterable[Row], dropped: Dropped) -> Iterator[Row]:
    is_empty = True
    for row in rows:
        is_empty = False
        yield row
    if is_empty:
        check_any([], sources, dropped)


def _size(path: str) -> int | str:
    files = parquet_files(Path(path)) or [Path(path)]
    return sum(file.stat().st_size for file in files) if files[0].is_file() else path
