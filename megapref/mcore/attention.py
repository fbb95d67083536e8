"""Attention over the segments of a pack (segments.py): Core's core-attention module, replaced.

Two kernels: torch's, on any device, and cuDNN's through Transformer Engine. Autograd adds up the gradients that a prefix gets from several segments.

Of context-parallel ranks each computes the attention of its own queries; keys and values of all ranks are gathered, which costs little as there are
few of their heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megapref.mcore.segments import AttentionPlan, SegmentParams, VarlenPlan

Varlen = Callable[[Tensor, Tensor, Tensor, VarlenPlan], Tensor]  # rows one segment after the other -> [rows, N, D]

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


def attend_varlen(query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, kernel: Varlen) -> Tensor:
    """`attend` in one call of a kernel that takes segments of any lengths."""
    out = kernel(_rows(query, plan.index_q), _rows(key, plan.index_kv), _rows(value, plan.index_kv), plan)
    return _rows(out, plan.order_T)


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
        self.varlen = _te_attention(config, softmax_scale, self.window) if config.te_attention else None

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
        if isinstance(plan, VarlenPlan):
            out = attend_varlen(query, key, value, plan, partial(_te_varlen, self.varlen))
        else:
            out = attend(query, key, value, plan, self.softmax_scale, self.softcap)
        return out.flatten(1)[:, None]


def _te_attention(config, softmax_scale: float | None, window: int | None) -> torch.nn.Module:
    """Transformer Engine's attention over a rank's heads. A causal mask from the bottom right lets a segment see all of its prefix."""
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        config.num_attention_heads // config.tensor_model_parallel_size,
        config.kv_channels,
        num_gqa_groups=config.num_query_groups // config.tensor_model_parallel_size,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right",
        window_size=None if window is None else (window - 1, 0),
        softmax_scale=softmax_scale,
    )


def _te_varlen(attention: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan) -> Tensor:
    out = attention(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        cu_seqlens_q=plan.starts_q,
        cu_seqlens_kv=plan.starts_kv,
        max_seqlen_q=plan.longest_q,
        max_seqlen_kv=plan.longest_kv,
    )
    return out.view_as(query)
