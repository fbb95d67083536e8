"""What a step computes, apart from the layout: how long its pairs are, how they are packed, what is sampled, what the reference is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megapref.data.packing import assign


@dataclass(frozen=True)
class PairLengths:
    """Tokens of a pair's prompt and completions; `second` 0 is a pair of one completion."""

    prompt: int
    first: int
    second: int


@dataclass(frozen=True)
class Job:
    """One step of a method on a batch of `pairs`, the lengths of the whole global batch."""

    pairs: tuple[PairLengths, ...]
    max_tokens: int = 4096  # of a pack
    share_prompt: bool = True
    dtype: Literal["fp32", "bf16"] = "bf16"
    fp8: bool = False  # the matrix products of the layers
    fp8_weights: bool = False  # the policy's layers have their matrices in FP8 alone
    fp8_reference: bool = False  # the resident reference's
    gradients: Literal["fp32", "bf16"] = "fp32"
    moments: Literal["fp32", "bf16", "fp8"] = "fp32"
    offload: float = 0.0  # share of the optimizer's state that is in CPU memory
    reference: Literal["resident", "swapped", "cached", "free", "none"] = "resident"
    prompts: int = 0  # that are sampled from; 0: the pairs are read from files
    candidates: int = 2  # completions of each prompt
    new_tokens: int = 0  # sampled per completion
    samples_reference: bool = False  # half of the candidates are the reference's
    max_requests: int = 256  # decoded together
    kv_cache: float | None = 0.0  # bytes per rank; None: what max_requests sequences need

    @property
    def bytes(self) -> int:
        """Of one weight or activation."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def input_bytes(self) -> int:
        """Of one element of a layer's matrix product's input, as it is kept for backward."""
        return 1 if self.fp8 else self.bytes

    @property
    def gradient_bytes(self) -> int:
        return 4 if self.gradients == "fp32" else 2

    @property
    def optimizer_bytes(self) -> int:
        """Per parameter of its shard: Adam's two moments, and a float32 copy of what is not float32 itself."""
        return 2 * {"fp32": 4, "bf16": 2, "fp8": 1}[self.moments] + (0 if self.dtype == "fp32" else 4)

    @property
    def products(self) -> Literal["fp32", "bf16", "fp8"]:
        """The type of the layers' matrix products."""
        return "fp8" if self.fp8 else self.dtype

    @property
    def online(self) -> bool:
        return self.prompts > 0

    @property
    def scores_reference(self) -> bool:
        return self.reference in ("resident", "swapped")


@dataclass(frozen=True)
class PackSizes:
    """What memory and time of one pack, or the sum of several, depend on."""

    tokens: int
    trained: int  # completion tokens
    key_rows: int  # rows of keys that attention gathers: a shared prompt counts for each side
    scores: int  # pairs of a query and a key that it sees
    masked: int  # entries of the masks of the segments that need one, in torch's attention


# Segments up to this many scores are computed together, under a mask (mcore/attention.py).
_SHORT_SEGMENT_SCORES = 96 * 96


def pair_sizes(pair: PairLengths, share_prompt: bool) -> PackSizes:
    """What a pair adds to its pack, in segments as data/packing.py lays them out."""
    segments = [(pair.prompt + pair.first, 0)]  # queries and the prefix that they see besides themselves
    if pair.second:
        segments.append((pair.second, pair.prompt) if share_prompt else (pair.prompt + pair.second, 0))
    return PackSizes(
        tokens=sum(query for query, _ in segments),
        trained=pair.first + pair.second,
        key_rows=sum(query + prefix for query, prefix in segments),
        scores=sum(query * prefix + query * (query + 1) // 2 for query, prefix in segments),
        masked=sum(area for query, prefix in segments if (area := query * (query + prefix)) <= _SHORT_SEGMENT_SCORES or prefix),
    )


def total(packs: Sequence[PackSizes]) -> PackSizes:
    """The sums over packs."""
    return PackSizes(*(sum(getattr(p, name) for p in packs) for name in PackSizes.__dataclass_fields__))


def rank_packs(job: Job, data_ranks: int, multiple: int) -> list[PackSizes]:
    """The packs of the data-parallel rank with the most tokens, padded to `multiple`, as data/packing.py makes them.

    Errors: ValueError for a pair that fits in no pack.
    """
    pairs = [pair_sizes(pair, job.share_prompt) for pair in job.pairs]
    capacity, longest = job.max_tokens // multiple * multiple, max(pair.tokens for pair in pairs)
    if longest > capacity:
        raise ValueError(f"a pair of {longest} tokens is longer than a pack of {capacity}; raise pack.max_tokens or shorten the pairs")
    ranks = assign([pair.tokens for pair in pairs], capacity, data_ranks)
    heaviest = max(ranks, key=lambda packs: sum(pairs[i].tokens for rows in packs for i in rows))
    return [_padded(total([pairs[i] for i in rows]), multiple) for rows in heaviest]


def _padded(pack: PackSizes, multiple: int) -> PackSizes:
    """Padding is a segment of its own."""
    extra = -pack.tokens % multiple or (0 if pack.tokens else multiple)
    area = extra * (extra + 1) // 2
    return PackSizes(pack.tokens + extra, pack.trained, pack.key_rows + extra, pack.scores + area, pack.masked + extra * extra)


def spread(histogram: Sequence[tuple[PairLengths, float]], count: int) -> tuple[PairLengths, ...]:
    """`count` pairs whose lengths are distributed as the histogram says: those at evenly spaced places of its cumulative weights."""
    if not histogram or count < 1 or min(weight for _, weight in histogram) < 0 or not sum(weight for _, weight in histogram):
        raise ValueError("a histogram of lengths needs entries with weights of 0 or more that are not all 0, and a batch of 1 or more")
    ends = np.cumsum([weight for _, weight in histogram], dtype=np.float64)
    places = (np.arange(count) + 0.5) / count * ends[-1]
    return tuple(histogram[i][0] for i in np.searchsorted(ends, places))
