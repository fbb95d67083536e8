"""Attention over the segments of a pack: Core's core-attention module, replaced.

Each segment attends to its prefix (the shared prompt, stored once) and causally to itself; autograd adds up the gradients that the prefix gets
from several segments. Short segments of similar size are computed together in one padded call, long ones each in a call of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

# One attention call costs about as much as this many query-key scores of a small model; joint calls may pad up to this share of their area.
_SHORT_SEGMENT_SCORES = 96 * 96
_PADDED_AREA = 1.3


@dataclass(frozen=True)
class SegmentGroup:
    """Segments computed in one call; `mask` [B, 1, Q, KV] is None for a lone segment without prefix, which is plainly causal."""

    num_segments: int
    mask: Tensor | None


@dataclass(frozen=True)
class AttentionPlan:
    """How a pack's attention is computed, made once and used by every layer.

    Rows are gathered in the order of the groups, `sizes_q` and `sizes_kv` of them for each, and `order_T` puts the output back into pack
    order; where an index is None the rows are in order already.
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

    The model's last layer goes on after its attention with `output_rows` of the pack alone; None is all of them.
    """

    plan: AttentionPlan | None = None
    output_rows: Tensor | None = None


def segment_params(segments_S: Tensor, max_length: int, device: torch.device, output_rows: Tensor | None) -> SegmentParams:
    """The layers' arguments for a pack with these segments [S, 4] (query start, query length, prefix start, prefix length)."""
    plan = attention_plan(segments_S, device)
    return SegmentParams(qkv_format="sbhd", max_seqlen_q=max_length, max_seqlen_kv=max_length, plan=plan, output_rows=output_rows)


def attention_plan(segments_S: Tensor, device: torch.device) -> AttentionPlan:
    """Groups segments so that few calls compute them with little padding."""
    segments = segments_S.cpu().numpy()
    segments = segments[segments[:, 1] > 0]
    by_size = segments[np.lexsort((segments[:, 0], segments[:, 1] + segments[:, 3], segments[:, 1]))]
    parts = [_group(members, device) for members in sorted(_join_short(by_size), key=lambda members: members[0, 0])]
    groups, rows_q, rows_kv = zip(*parts, strict=True)
    index_q, index_kv = np.concatenate(rows_q), np.concatenate(rows_kv)
    order = np.argsort(index_q, kind="stable")[(index_q < 0).sum() :]
    return AttentionPlan(
        groups,
        [len(rows) for rows in rows_q],
        [len(rows) for rows in rows_kv],
        *(None if _in_order(index) else torch.from_numpy(index.clip(min=0)).to(device) for index in (index_q, index_kv, order)),
    )


def _in_order(index: np.ndarray) -> bool:
    return index[0] == 0 and bool((np.diff(index) == 1).all())


def _join_short(segments: np.ndarray) -> list[np.ndarray]:
    """Runs of segments, sorted by size, whose padded area stays within bounds; long segments alone."""
    joined: list[list[np.ndarray]] = []
    area = 0
    for segment in segments:
        scores = segment[1] * (segment[1] + segment[3])
        if joined and scores <= _SHORT_SEGMENT_SCORES:
            members = [*joined[-1], segment]
            padded = len(members) * max(m[1] for m in members) * max(m[1] + m[3] for m in members)
            if padded <= _PADDED_AREA * (area + scores):
                joined[-1] = members
                area += scores
                continue
        joined.append([segment])
        area = scores
    return [np.stack(members) for members in joined]


def _group(members: np.ndarray, device: torch.device) -> tuple[SegmentGroup, np.ndarray, np.ndarray]:
    """A group, the pack rows of its queries and those of its keys; -1 is padding."""
    if len(members) == 1 and members[0, 3] == 0:
        start, length = members[0, :2]
        return SegmentGroup(1, None), np.arange(start, start + length), np.arange(start, start + length)
    longest_q, longest_kv = int(members[:, 1].max()), int((members[:, 1] + members[:, 3]).max())
    index_q = np.full((len(members), longest_q), -1)
    index_kv = np.full((len(members), longest_kv), -1)
    mask = np.zeros((len(members), longest_q, longest_kv), bool)
    for i, (start, length, prefix_start, prefix) in enumerate(members):
        index_q[i, :length] = np.arange(start, start + length)
        index_kv[i, :prefix] = np.arange(prefix_start, prefix_start + prefix)
        index_kv[i, prefix : prefix + length] = np.arange(start, start + length)
        mask[i, :length, : prefix + length] = np.tri(length, prefix + length, prefix, bool)
        mask[i, length:, 0] = True  # padding rows see one key, so that their (unused) output is finite
    return SegmentGroup(len(members), torch.from_numpy(mask).to(device)[:, None]), index_q.ravel(), index_kv.ravel()


def attend(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float | None) -> Tensor:
    """Attention of a pack: query [T, N, D], key and value [T, groups, D] to [T, N, D]."""
    # One gather and one split for all groups: slices taken group by group would each cost a gradient of the whole pack's size.
    parts = (
        _rows(x, index).split(sizes)
        for x, index, sizes in ((query, plan.index_q, plan.sizes_q), (key, plan.index_kv, plan.sizes_kv), (value, plan.index_kv, plan.sizes_kv))
    )
    outputs = []
    for group, *qkv in zip(plan.groups, *parts, strict=True):
        q, k, v = (x.unflatten(0, (group.num_segments, -1)).transpose(1, 2) for x in qkv)
        outputs.append(_sdpa(q, k, v, group.mask, scale).transpose(1, 2).flatten(0, 1))
    return _rows(torch.cat(outputs), plan.order_T)


def _rows(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


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
        self.softmax_scale = softmax_scale

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
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out = _sdpa(q, k, v, None, self.softmax_scale).permute(2, 0, 1, 3)
            return out.flatten(2)
        out = attend(query[:, 0], key[:, 0], value[:, 0], packed_seq_params.plan, self.softmax_scale)
        return out.flatten(1)[:, None]


