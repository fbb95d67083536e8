"""How the attention over the segments of a pack is computed: which rows are gathered, and what is computed in one call.

Each segment attends to its prefix (the shared prompt, stored once) and causally to itself. torch computes short segments of similar size together in
one padded call, long ones each in a call of their own; cuDNN takes all segments, whatever their sizes, in one.

Context-parallel ranks have some of a pack's rows each (`context_rows`): a plan is for the rows of one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

if TYPE_CHECKING:
    from megapref.mcore.router import TrainedTokens

# One attention call costs about as much as this many query-key scores of a small model; joint calls may pad up to this share of their area.
_SHORT_SEGMENT_SCORES = 96 * 96
_PADDED_AREA = 1.3
# Under a sliding window long segments are computed in parts of at least so many queries.
_LEAST_WINDOW_PART = 128

# Rows of a pack: those of queries, and those of the keys they see, the last ones of which are their own.
_Piece = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class SegmentGroup:
    """Segments computed in one call; `mask` [B, 1, Q, KV] is None for a lone segment without prefix, which is plainly causal."""

    num_segments: int
    mask: Tensor | None


@dataclass(frozen=True)
class AttentionPlan:
    """How a rank computes the attention of its rows of a pack, made once and used by every layer.

    Rows are gathered in the order of the groups, `sizes_q` and `sizes_kv` of them for each, and `order_T` puts the output back into the order of
    the rows; where an index is None the rows are in order already. Keys are numbered as they come when those of context-parallel ranks are joined.
    """

    groups: tuple[SegmentGroup, ...]
    sizes_q: list[int]
    sizes_kv: list[int]
    index_q: Tensor | None
    index_kv: Tensor | None
    order_T: Tensor | None


@dataclass(frozen=True)
class VarlenPlan:
    """How a rank computes the attention of its rows in one call over segments of any lengths, one after the other.

    Segment i has the gathered rows from `starts_q[i]` to `starts_q[i + 1]` and sees the keys from `starts_kv[i]` to `starts_kv[i + 1]`, causally from
    the bottom right: its last row sees all of them. Indexes as in `AttentionPlan`.
    """

    starts_q: Tensor
    starts_kv: Tensor
    longest_q: int
    longest_kv: int
    index_q: Tensor | None
    index_kv: Tensor | None
    order_T: Tensor | None


@dataclass
class SegmentParams(PackedSeqParams):
    """What Core hands through to the layers; "sbhd" makes Core apply rotary embeddings row by row.

    `window_plan` is for layers with a sliding window. The model's last layer goes on after its attention with `output_rows` of the pack alone;
    None is all of them. `trained` is for the routers of a mixture that is trained.
    """

    plan: AttentionPlan | VarlenPlan | None = None
    window_plan: AttentionPlan | VarlenPlan | None = None
    output_rows: Tensor | None = None
    trained: TrainedTokens | None = None


def segment_params(
    segments_S: Tensor,
    num_tokens: int,
    device: torch.device,
    output_rows: Tensor | None,
    window: int | None = None,
    context: tuple[int, int] = (1, 0),
    varlen: bool = False,
) -> SegmentParams:
    """The layers' arguments for a pack with these segments [S, 4] (query start, query length, prefix start, prefix length).

    `window`: how many tokens, itself included, a token sees in layers that have a sliding window. `context`: how many context-parallel ranks
    there are and which this is; `output_rows` counts its own rows. `varlen`: the plan is a `VarlenPlan`, whose kernel knows windows.
    """
    longest = int((segments_S[:, 1] + segments_S[:, 3]).max())
    if varlen:
        plan = window_plan = varlen_plan(segments_S, device, num_tokens, context)
    else:
        plan = attention_plan(segments_S, device, num_tokens, context=context)
        window_plan = plan if window is None or longest <= window else attention_plan(segments_S, device, num_tokens, window, context)
    return SegmentParams(
        qkv_format="sbhd",
        max_seqlen_q=num_tokens,
        max_seqlen_kv=num_tokens,
        plan=plan,
        window_plan=window_plan,
        output_rows=output_rows,
    )


def context_rows(num_tokens: int, size: int) -> np.ndarray:
    """[size, num_tokens / size] the rows of a pack that each context-parallel rank has.

    Of 2 * size equal parts rank r has those numbered r and 2 * size - 1 - r, so that queries with few and with many keys are dealt out evenly.
    """
    if size == 1:
        return np.arange(num_tokens)[None]
    parts = np.arange(num_tokens).reshape(2 * size, -1)
    return np.concatenate([parts[:size], parts[: size - 1 : -1]], 1)


def attention_plan(
    segments_S: Tensor, device: torch.device, num_tokens: int, window: int | None = None, context: tuple[int, int] = (1, 0)
) -> AttentionPlan:
    """Groups segments, or what a context-parallel rank has of them, so that few calls compute them with little padding."""
    rows, pieces = _own_pieces(segments_S, num_tokens, window, context)
    by_size = sorted(pieces, key=lambda piece: (len(piece[0]), len(piece[1]), piece[0][0]))
    parts = [_group(members, window, device) for members in sorted(_join_short(by_size), key=lambda members: members[0][0][0])]
    groups, rows_q, rows_kv = zip(*parts, strict=True)
    indexes = _indexes(np.concatenate(rows_q), np.concatenate(rows_kv), rows, context, device)
    return AttentionPlan(groups, [len(rows) for rows in rows_q], [len(rows) for rows in rows_kv], *indexes)


def varlen_plan(segments_S: Tensor, device: torch.device, num_tokens: int, context: tuple[int, int] = (1, 0)) -> VarlenPlan:
    """All segments, or what a context-parallel rank has of them, in their order."""
    rows, pieces = _own_pieces(segments_S, num_tokens, None, context)
    starts, longest = [], []
    for side in zip(*pieces, strict=True):
        lengths = [len(index) for index in side]
        starts.append(torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32, device=device))
        longest.append(max(lengths))
    indexes = _indexes(*(np.concatenate(side) for side in zip(*pieces, strict=True)), rows, context, device)
    return VarlenPlan(*starts, *longest, *indexes)


def _own_pieces(segments_S: Tensor, num_tokens: int, window: int | None, context: tuple[int, int]) -> tuple[np.ndarray, list[_Piece]]:
    """The rows [size, rows] of every context-parallel rank, and the pieces of segments among this rank's."""
    size, rank = context
    rows = context_rows(num_tokens, size)
    runs = [(run[0], run[-1] + 1) for run in np.split(rows[rank], np.flatnonzero(np.diff(rows[rank]) != 1) + 1)]
    return rows, [piece for segment in segments_S.tolist() for run in runs for piece in _pieces(*segment, *run, window)]


def _indexes(
    index_q: np.ndarray, index_kv: np.ndarray, rows: np.ndarray, context: tuple[int, int], device: torch.device
) -> list[Tensor | None]:
    """`index_q`, `index_kv` and `order_T` of a plan that gathers these rows of the pack; -1 is padding."""
    size, rank = context
    if size > 1:
        index_q, index_kv = _numbered(index_q, rows[rank]), _numbered(index_kv, rows.ravel())
    order = np.argsort(index_q, kind="stable")[(index_q < 0).sum() :]
    return [None if _in_order(index) else torch.from_numpy(index.clip(min=0)).to(device) for index in (index_q, index_kv, order)]


def _pieces(start: int, length: int, prefix_start: int, prefix: int, first: int, end: int, window: int | None) -> Iterator[_Piece]:
    """A segment's rows among those from `first` to `end`; under a window those of parts of a long segment, each with the keys in reach of it."""
    rows = np.concatenate([np.arange(prefix_start, prefix_start + prefix), np.arange(start, start + length)])
    low, high = (prefix + min(max(row - start, 0), length) for row in (first, end))
    if low == high:
        return
    if window is None or high <= window:
        yield rows[low:high], rows[:high]
        return
    for at in range(low, high, step := max(window, _LEAST_WINDOW_PART)):
        to = min(at + step, high)
        yield rows[at:to], rows[max(at - window + 1, 0) : to]


def _numbered(index: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The places in `rows` of the pack's rows in `index`; -1 stays."""
    places = np.full(rows.max() + 2, -1)
    places[rows] = np.arange(len(rows))
    return places[index]


def _in_order(index: np.ndarray) -> bool:
    return index[0] == 0 and bool((np.diff(index) == 1).all())


def _join_short(pieces: list[_Piece]) -> list[list[_Piece]]:
    """Runs of pieces, sorted by size, whose padded area stays within bounds; long pieces alone."""
    joined: list[list[_Piece]] = []
    area = 0
    for piece in pieces:
        scores = len(piece[0]) * len(piece[1])
        if joined and scores <= _SHORT_SEGMENT_SCORES:
            members = [*joined[-1], piece]
            padded = len(members) * max(len(m[0]) for m in members) * max(len(m[1]) for m in members)
            if padded <= _PADDED_AREA * (area + scores):
                joined[-1] = members
                area += scores
                continue
        joined.append([piece])
        area = scores
    return joined


def _group(members: list[_Piece], window: int | None, device: torch.device) -> tuple[SegmentGroup, np.ndarray, np.ndarray]:
    """A group, the pack rows of its queries and those of its keys; -1 is padding."""
    if len(members) == 1 and len(members[0][0]) == len(members[0][1]) and (window is None or len(members[0][1]) <= window):
        return SegmentGroup(1, None), *members[0]
    longest_q, longest_kv = max(len(queries) for queries, _ in members), max(len(keys) for _, keys in members)
    index_q = np.full((len(members), longest_q), -1)
    index_kv = np.full((len(members), longest_kv), -1)
    mask = np.zeros((len(members), longest_q, longest_kv), bool)
    for i, (queries, keys) in enumerate(members):
        length, num_keys = len(queries), len(keys)
        index_q[i, :length], index_kv[i, :num_keys] = queries, keys
        mask[i, :length, :num_keys] = np.tri(length, num_keys, num_keys - length, bool)
        if window is not None:
            mask[i, :length, :num_keys] &= ~np.tri(length, num_keys, num_keys - length - window, bool)
        mask[i, length:, 0] = True  # padding rows see one key, so that their (unused) output is finite
    return SegmentGroup(len(members), torch.from_numpy(mask).to(device)[:, None]), index_q.ravel(), index_kv.ravel()
