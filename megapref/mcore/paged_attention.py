"""flash-attn's two paged-cache functions in torch, for Core's inference engine on CPU (transformer/attention.py calls them by these names).

Keys and values live in cache blocks [num_blocks, block size, KV heads, D]; `block_table` [requests, blocks] says which blocks a request owns.
The cache is uninitialised memory: values of dead positions are zeroed, because 0 * NaN is NaN even under a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from megapref.mcore.attention import sdpa, softcapped


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    block_table: Tensor | None = None,
    return_attn_probs: bool = False,
) -> Tensor:
    """Attention of prefill queries [tokens, N, D] to their paged keys, bottom-right causal; [tokens, N, D].

    `window_size[0]`: how many tokens before itself a token sees; -1 is all.
    """
    assert causal and window_size[1] <= 0 and block_table is not None and not return_attn_probs
    out = torch.zeros_like(q)
    block_size = k.shape[1]
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for request, (q_start, q_end) in enumerate(pairwise(starts_q)):
        num_q, num_k = q_end - q_start, starts_k[request + 1] - starts_k[request]
        if num_q <= 0 or num_k <= 0:
            continue
        blocks = block_table[request, : -(-num_k // block_size)].long()
        keys, values = k[blocks].flatten(0, 1)[:num_k], v[blocks].flatten(0, 1)[:num_k]
        is_cut = 0 <= window_size[0] < num_k - 1
        mask = None if num_q == num_k and not is_cut else torch.ones(num_q, num_k, dtype=torch.bool, device=q.device).tril(num_k - num_q)
        if is_cut:
            mask = mask.triu(num_k - num_q - window_size[0])
        heads_first = (x.transpose(0, 1)[None] for x in (q[q_start:q_end], keys, values))
        attended = sdpa(*heads_first, mask, softmax_scale, softcap)
        out[q_start:q_end] = attended[0].transpose(0, 1)
    return out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    block_table: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    """Attention of the newest tokens [requests, tokens, N, D] to their paged keys; [requests, tokens, N, D]."""
    assert causal and window_size[1] <= 0 and block_table is not None and not return_softmax_lse
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros_like(q)
    for some in of_similar_length(cache_seqlens.tolist()):
        rows = torch.tensor(some, device=q.device)
        lengths, blocks = cache_seqlens[rows].long(), block_table[rows].long()
        out[rows] = _attend(q[rows], k_cache, v_cache, lengths, blocks, scale, window_size[0], softcap)
    return out


def of_similar_length(lengths: Sequence[int]) -> list[list[int]]:
    """The numbers of the requests, long ones first, in groups whose longest is little longer than their shortest; those of length 0 are left out.

    A group is padded to its longest, and each one costs some calls.
    """
    groups: list[list[int]] = []
    for request in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i]):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest - lengths[request] <= max(32, longest // 4):
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups


def _attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, block_table: Tensor, scale: float, window: int, softcap: float | None
) -> Tensor:
    """Attention of the newest tokens of requests that have `lengths` [requests], at least one, with their keys padded to the longest."""
    requests, num_q, heads, width = q.shape
    groups, block_size = k_cache.shape[2], k_cache.shape[1]
    shortest, longest = int(lengths.min()) - num_q + 1, int(lengths.max())
    # Under a window no query sees the blocks before `origin`.
    origin = 0 if window < 0 else max(0, shortest - 1 - window) // block_size * block_size
    blocks = block_table[:, origin // block_size : -(-longest // block_size)].clamp(min=0)
    # Copies; index_select takes whole blocks, where an index in brackets goes number by number.
    gathered = (cache.index_select(0, blocks.flatten()).view(requests, -1, groups, width) for cache in (k_cache, v_cache))
    keys, values = (cached[:, : longest - origin] for cached in gathered)
    position = torch.arange(shortest, longest, device=q.device)  # those before are seen by every query, but for the window
    values[:, shortest - origin :].masked_fill_((position >= lengths[:, None])[:, :, None, None], 0)  # dead keys are masked as scores
    place = (lengths[:, None] - num_q + torch.arange(num_q, device=q.device))[..., None]
    dead = position > place
    passed = torch.arange(origin, longest, device=q.device) < place - window
    # The query heads of one KV head become query rows: one pass over each KV head's cache, which is read in place.
    rows = q.view(requests, num_q, groups, heads // groups, width).permute(2, 0, 1, 3, 4).flatten(2, 3)
    dead, passed = (mask.repeat_interleave(heads // groups, dim=1) for mask in (dead, passed))
    out = torch.empty_like(rows)
    for group in range(groups):
        scores = softcapped(torch.bmm(rows[group], keys[:, :, group].transpose(1, 2)).mul_(scale), softcap)
        scores[..., shortest - origin :].masked_fill_(dead, float("-inf"))
        if window >= 0:
            scores.masked_fill_(passed, float("-inf"))
        torch.bmm(scores.softmax(-1), values[:, :, group], out=out[group])
    return out.view(groups, requests, num_q, heads // groups, width).permute(1, 2, 0, 3, 4).reshape(q.shape)
