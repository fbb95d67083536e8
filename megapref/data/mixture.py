"""Which rows make which step: a pure function of seed and step, the same on every rank and after a resume.

An epoch is as many draws as there are rows. Without weights every row is drawn once in it. With weights every source gets its share of the
draws, rounded to whole rows and spread evenly over the epoch; a source goes through all its rows before it repeats one, across epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rows(Sequence):
    """The usable rows of all sources, one source after the other; `sizes` of the sources, and their `weights` where they have some."""

    items: list[Any]
    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def rows_of(items: list[Any], ends: Sequence[int], sources: Sequence[Any]) -> Rows:
    """The rows of the sources, of which each one's end at `ends`. ValueError for a source without rows, or too little weight, among weighted ones."""
    sizes = tuple(np.diff(ends, prepend=0).tolist())
    if all(source.weight is None for source in sources):
        return Rows(items, sizes)
    weights = tuple(source.weight for source in sources)
    for source, size in zip(sources, sizes, strict=True):
        if not size:
            raise ValueError(f"data: no usable row in {source.path}, which has weight={source.weight}; repair its rows or leave it out")
    shares_of(sizes, weights)
    return Rows(items, sizes, weights)


def step_rows(
    sizes: Sequence[int], weights: Sequence[float] | None = None, *, global_batch_size: int, step: int, seed: int, shuffle: bool = True
) -> np.ndarray:
    """[global_batch_size] numbers of the rows of step `step`, counted from 0 over all sources; steps run on over the border of two epochs."""
    draws = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
    if weights is None:
        return _drawn(sum(sizes), draws, (seed,), shuffle)
    shares = shares_of(sizes, weights)
    source_of, turn_of = _turns(shares)
    epochs, places = np.divmod(draws, sum(sizes))
    sources = source_of[places]
    rows = np.empty_like(draws)
    for source in np.unique(sources):
        mine = sources == source
        own_draws = epochs[mine] * shares[source] + turn_of[places[mine]]
        rows[mine] = sum(sizes[:source]) + _drawn(sizes[source], own_draws, (seed, int(source)), shuffle)
    return rows


def shares_of(sizes: Sequence[int], weights: Sequence[float]) -> tuple[int, ...]:
    """How many of an epoch's draws each source gets: in proportion to the weights, rounded so that the sum is exact (largest remainder).

    ValueError for a source that would get none.
    """
    exact = np.array(weights) / sum(weights) * sum(sizes)
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: sum(sizes) - shares.sum()]] += 1
    if not shares.all():
        source = int(np.argmin(shares))
        raise ValueError(
            f"data.train[{source}].weight={weights[source]:g} of {sum(weights):g} is less than one of the {sum(sizes)} rows of an epoch; raise it"
        )
    return tuple(shares.tolist())


@lru_cache(maxsize=4)
def _turns(shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of every draw of an epoch its source, and how often that source was drawn before in the epoch."""
    source_of = np.repeat(np.arange(len(shares)), shares)
    turn_of = np.concatenate([np.arange(share) for share in shares])
    when = (turn_of + 0.5) / np.array(shares)[source_of]
    order = np.argsort(when, kind="stable")
    return source_of[order], turn_of[order]


def _drawn(num_rows: int, draws: np.ndarray, seed: tuple[int, ...], shuffle: bool) -> np.ndarray:
    """The rows of numbered draws from one source that is gone through again and again."""
    if not shuffle:
        return draws % num_rows
    epochs = draws // num_rows
    rows = np.empty_like(draws)
    for epoch in np.unique(epochs):
        rows[epochs == epoch] = _epoch_order(num_rows, seed, int(epoch))[draws[epochs == epoch] % num_rows]
    return rows


@lru_cache(maxsize=16)
def _epoch_order(num_rows: int, seed: tuple[int, ...], epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([*seed, epoch])).permutation(num_rows)
