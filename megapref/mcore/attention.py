"""Attention over the segments of a pack: Core's core-attention module, replaced.

Each segment attends to its prefix (the shared prompt, stored once) and causally to itself; autograd adds up the gradients that the prefix gets
from several segments. Short segments of similar size are computed together in one padded call, long ones each in a call of their own.

Context-parallel ranks have some of a pack's rows each (`context_rows`). Each computes the attention of its own queries; keys and values of all ranks
are gathered, which costs little as there are few of their heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

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


@dataclass
class SegmentParams(PackedSeqParams):
    """What Core hands through to the layers; "sbhd" makes Core apply rotary embeddings row by row.

    `window_plan` is for layers with a sliding window. The model's last layer goes on after its attention with `output_rows` of the pack alone;
    None is all of them.
    """

    plan: AttentionPlan | None = None
    window_plan: AttentionPlan | None = None
    output_rows: Tensor | None = None


def segment_params(
    segments_S: Tensor,
    num_tokens: int,
    device: torch.device,
    output_rows: Tensor | None,
    window: int | None = None,
    context: tuple[int, int] = (1, 0),
) -> SegmentParams:
    """The layers' arguments for a pack with these segments [S, 4] (query start, query length, prefix start, prefix length).

    `window`: how many tokens, itself included, a token sees in layers that have a sliding window. `context`: how many context-parallel ranks
    there are and which this is; `output_rows` counts its own rows.
    """
    plan = attention_plan(segments_S, device, num_tokens, context=context)
    longest = int((segments_S[:, 1] + segments_S[:, 3]).max())
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
    size, rank = context
    rows = context_rows(num_tokens, size)
    runs = [(run[0], run[-1] + 1) for run in np.split(rows[rank], np.flatnonzero(np.diff(rows[rank]) != 1) + 1)]
    pieces = [piece for segment in segments_S.tolist() for run in runs for piece in _pieces(*segment, *run, window)]
    by_size = sorted(pieces, key=lambda piece: (len(piece[0]), len(piece[1]), piece[0][0]))
    parts = [_group(members, window, device) for members in sorted(_join_short(by_size), key=lambda members: members[0][0][0])]
    groups, rows_q, rows_kv = zip(*parts, strict=True)
    index_q, index_kv = np.concatenate(rows_q), np.concatenate(rows_kv)
    if size > 1:
        index_q, index_kv = _numbered(index_q, rows[rank]), _numbered(index_kv, rows.ravel())
    order = np.argsort(index_q, kind="stable")[(index_q < 0).sum() :]
    return AttentionPlan(
        groups,
        [len(rows) for rows in rows_q],
        [len(rows) for rows in rows_kv],
        *(None if _in_order(index) else torch.from_numpy(index.clip(min=0)).to(device) for index in (index_q, index_kv, order)),
    )


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


def attend(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float | None, softcap: float | None = None) -> Tensor:
    """Attention of a rank's rows of a pack: query [T, N, D], key and value [rows of all context-parallel ranks, groups, D] to [T, N, D]."""
    # One gather and one split for all groups: slices taken group by group would each cost a gradient of the whole pack's size.
    parts = (
        _rows(x, index).split(sizes)
        for x, index, sizes in ((query, plan.index_q, plan.sizes_q), (key, plan.index_kv, plan.sizes_kv), (value, plan.index_kv, plan.sizes_kv))
    )
    outputs = []
    for group, *qkv in zip(plan.groups, *parts, strict=True):
        q, k, v = (x.unflatten(0, (group.num_segments, -1)).transpose(1, 2) for x in qkv)
        outputs.append(sdpa(q, k, v, group.mask, scale, softcap).transpose(1, 2).flatten(0, 1))
    return _rows(torch.cat(outputs), plan.order_T)


def _rows(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None = None) -> Tensor:
    """Attention of heads [B, N, Q, D] over [B, groups, KV, D], causal without a mask; torch has no fused kernel for a softcap."""
    if softcap is not None:
        heads = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(heads, 1) for x in (k, v))
        scores = softcapped(q @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale), softcap)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril() if mask is None else mask
        return scores.float().masked_fill(~seen, float("-inf")).softmax(-1).to(q.dtype) @ values
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def softcapped(scores: Tensor, cap: float | None) -> Tensor:
    """`cap` * tanh(scores / cap); the scores where it is None."""
    return scores if cap is None else torch.tanh(scores / cap) * cap


class _GatherRows(torch.autograd.Function):
    """The rows of all context-parallel ranks, one rank's after the other's; each rank's gradient is the sum of all that used its rows."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        gathered = rows.new_empty(group.size() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        mine = gradient.new_empty(len(gradient) // group.size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(mine, gradient.contiguous(), group=group)
        return mine


class SegmentAttention(MegatronModule):
    """Core's core-attention module: segments of a pack with `SegmentParams`, plain causal attention over [s, b, N, D] without.

    Decoding does not come here: Core's engine calls flash-attn on its paged cache.
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type,
        attention_type: str | None = None,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
        **kwargs,
    ):
        super().__init__(config=config)
        self.softmax_scale, self.softcap = softmax_scale, config.attention_softcap
        # Core's (left, right) counts what is seen besides the token itself.
        is_local = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if is_local else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params: SegmentParams | None = None,
    ) -> Tensor:
        """[s, b, N * D]."""
        if packed_seq_params is None:
            assert self.config.context_parallel_size == 1, "context parallelism splits packs"
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            length = len(query)
            is_cut = self.window is not None and length > self.window
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - self.window) if is_cut else None
            return sdpa(q, k, v, mask, self.softmax_scale, self.softcap).permute(2, 0, 1, 3).flatten(2)
        plan = packed_seq_params.plan if self.window is None else packed_seq_params.window_plan
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        if self.config.context_parallel_size > 1:
            key, value = _GatherRows.apply(torch.stack([key, value], 1)).unbind(1)
        out = attend(query, key, value, plan, self.softmax_scale, self.softcap)
        return out.flatten(1)[:, None]


