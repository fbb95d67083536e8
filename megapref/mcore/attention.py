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
    """Segments computed in one call. A lone segment without prefix is a slice (`index_q` None); others gather rows, with a mask [B, 1, Q, KV]."""

    start: int
    length: int
    index_q: Tensor | None = None  # [B * Q] rows of the pack
    index_kv: Tensor | None = None  # [B * KV]
    mask: Tensor | None = None
    num_segments: int = 1


@dataclass(frozen=True)
class AttentionPlan:
    """How a pack's attention is computed, made once and used by every layer: `order_T` puts the rows of the groups back into pack order."""

    groups: tuple[SegmentGroup, ...]
    order_T: Tensor | None


@dataclass
class SegmentParams(PackedSeqParams):
    """What Core hands through to the attention module; "sbhd" makes Core apply rotary embeddings row by row."""

    plan: AttentionPlan | None = None


def segment_params(segments_S: Tensor, max_length: int, device: torch.device) -> SegmentParams:
    """The attention arguments of a pack with these segments [S, 4] (query start, query length, prefix start, prefix length)."""
    return SegmentParams(qkv_format="sbhd", max_seqlen_q=max_length, max_seqlen_kv=max_length, plan=attention_plan(segments_S, device))


def attention_plan(segments_S: Tensor, device: torch.device) -> AttentionPlan:
    """Groups segments so that few calls compute them with little padding."""
    segments = segments_S.cpu().numpy()
    segments = segments[segments[:, 1] > 0]
    by_size = segments[np.lexsort((segments[:, 0], segments[:, 1] + segments[:, 3], segments[:, 1]))]
    groups: list[SegmentGroup] = []
    rows: list[np.ndarray] = []  # for each group: the pack row of each of its output rows, -1 for padding
    for members in _join_short(by_size):
        group, group_rows = _group(members, device)
        groups.append(group)
        rows.append(group_rows)
    flat = np.concatenate(rows)
    if (np.diff(flat) == 1).all():
        return AttentionPlan(tuple(groups), None)
    order = np.empty(int((flat >= 0).sum()), np.int64)
    order[flat[flat >= 0]] = np.nonzero(flat >= 0)[0]
    return AttentionPlan(tuple(groups), torch.from_numpy(order).to(device))


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


def _group(members: np.ndarray, device: torch.device) -> tuple[SegmentGroup, np.ndarray]:
    start, length, _, prefix = (int(x) for x in members[0])
    if len(members) == 1 and prefix == 0:
        return SegmentGroup(start, length), np.arange(start, start + length)
    longest_q, longest_kv = int(members[:, 1].max()), int((members[:, 1] + members[:, 3]).max())
    index_q = np.full((len(members), longest_q), -1)
    index_kv = np.zeros((len(members), longest_kv), np.int64)
    mask = np.zeros((len(members), longest_q, longest_kv), bool)
    for i, (start, length, prefix_start, prefix) in enumerate(members):
        index_q[i, :length] = np.arange(start, start + length)
        index_kv[i, :prefix] = np.arange(prefix_start, prefix_start + prefix)
        index_kv[i, prefix : prefix + length] = np.arange(start, start + length)
        mask[i, :length, : prefix + length] = np.tri(length, prefix + length, prefix, bool)
        mask[i, length:, 0] = True  # padding rows see one key, so that their (unused) output is finite
    as_tensor = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    group = SegmentGroup(
        start=int(members[0, 0]),
        length=longest_q,
        index_q=as_tensor(np.maximum(index_q, 0).ravel()),
        index_kv=as_tensor(index_kv.ravel()),
        mask=as_tensor(mask)[:, None],
        num_segments=len(members),
    )
    return group, index_q.ravel()


def attend(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float | None) -> Tensor:
    """Attention of a pack: query [T, N, D], key and value [T, groups, D] to [T, N, D]."""
    outputs = []
    for group in plan.groups:
        if group.index_q is None:
            rows = slice(group.start, group.start + group.length)
            q, k, v = (x[rows].transpose(0, 1)[None] for x in (query, key, value))
        else:
            q, k, v = (
                x.index_select(0, index).view(group.num_segments, -1, *x.shape[1:]).transpose(1, 2)
                for x, index in ((query, group.index_q), (key, group.index_kv), (value, group.index_kv))
            )
        out = _sdpa(q, k, v, group.mask, scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined if plan.order_T is None else joined.index_select(0, plan.order_T)


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


