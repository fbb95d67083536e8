"""The yardstick of tools/benchmark.py: a bare DPO step on transformers' weights, with no framework around it.

One function per idea and no option: pairs packed with the prompt stored once, attention per segment, the last layer's MLP and the LM head only
where a completion token is predicted, the head in chunks, torch's fused AdamW, float32, one process. It shares nothing with megapref but
`TokenPair`, so it also checks what megapref computes. For Qwen2, Llama and Mistral weights (any rotary scaling, no sliding window).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from megapref.batch import TokenPair

HEAD_CHUNK = 256
FAMILIES = ("qwen2", "llama", "mistral")  # model_type of the weights it can run; no sliding window


@dataclass(frozen=True)
class Layout:
    """Pairs laid end to end: where each starts and its sides begin, and which row predicts which completion token."""

    ids: Tensor
    positions: Tensor
    bounds: list[tuple[int, int, int, int]]  # start, first side, second side, end
    rows: Tensor
    targets: Tensor
    cells: Tensor  # 2 * pair + side


def bare_dpo_step(folder: Path, *, lr: float, beta: float, clip_grad: float) -> Callable[[list[TokenPair]], tuple[float, float]]:
    """A function that makes one optimizer step on the pairs, scoring them with a frozen copy first; it returns loss and gradient norm."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    reference.requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0, fused=True)

    def step(pairs: list[TokenPair]) -> tuple[float, float]:
        layout = lay_out(pairs)
        with torch.no_grad():
            reference_P2 = completion_logps(reference, layout, len(pairs))
        first_P, second_P = (completion_logps(policy, layout, len(pairs)) - reference_P2).unbind(1)
        loss = -F.logsigmoid(beta * (first_P - second_P)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item()

    return step


def lay_out(pairs: list[TokenPair]) -> Layout:
    """The pairs as `[prompt | first | second]`, one after the other."""
    ids, positions, bounds, rows, cells = [], [], [], [], []
    for number, pair in enumerate(pairs):
        prompt, first, second = len(pair.prompt_ids), len(pair.first_ids), len(pair.second_ids)
        start = len(ids)
        a, b, end = start + prompt, start + prompt + first, start + prompt + first + second
        ids += [*pair.prompt_ids, *pair.first_ids, *pair.second_ids]
        positions += [*range(prompt + first), *range(prompt, prompt + second)]
        bounds.append((start, a, b, end))
        rows += [a - 1, *range(a, b - 1), a - 1, *range(b, end - 1)]
        cells += [2 * number] * first + [2 * number + 1] * second
    is_completion = [t for _, a, _, end in bounds for t in range(a, end)]
    tokens = torch.tensor(ids)
    return Layout(tokens, torch.tensor(positions), bounds, torch.tensor(rows), tokens[is_completion], torch.tensor(cells))


def completion_logps(model: PreTrainedModel, layout: Layout, num_pairs: int) -> Tensor:
    """[P, 2]: summed log-probabilities of the completions."""
    decoder = model.model
    x = decoder.embed_tokens(layout.ids)
    cos, sin = (table[0, :, None] for table in decoder.rotary_emb(x, layout.positions[None]))
    for layer in decoder.layers:
        attention, width = layer.self_attn, layer.self_attn.head_dim
        h = layer.input_layernorm(x)
        q, k, v = (project(h).view(len(h), -1, width) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, layout.bounds)
        if layer is decoder.layers[-1]:
            out, x = out[layout.rows], x[layout.rows]
        x = x + attention.o_proj(out)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logps_K = HeadLogps.apply(decoder.norm(x), model.lm_head.weight, layout.targets)
    return torch.zeros(2 * num_pairs).index_add(0, layout.cells, logps_K).view(-1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv:2104.09864) of x [T, N, D], its halves being the two coordinates."""
    a, b = x.chunk(2, -1)
    c, s = cos[..., : a.shape[-1]], sin[..., : a.shape[-1]]
    return torch.cat((a * c - b * s, b * c + a * s), -1)


def attend(q: Tensor, k: Tensor, v: Tensor, bounds: list[tuple[int, int, int, int]]) -> Tensor:
    """[T, N * D]: prompt and first side in one causal call, the second side against the prompt and itself."""
    parts = []
    for start, a, b, end in bounds:
        parts.append(_causal(q[start:b], k[start:b], v[start:b]))
        parts.append(_causal(q[b:end], torch.cat((k[start:a], k[b:end])), torch.cat((v[start:a], v[b:end]))))
    return torch.cat(parts).flatten(1)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bottom-right causal attention of [n, N, D] to [m, groups, D]."""
    n, m = len(q), len(k)
    mask = None if n == m else torch.ones(n, m, dtype=torch.bool).tril(m - n)
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out[0].transpose(0, 1)


class HeadLogps(torch.autograd.Function):
    """Log-probability of each row's target under softmax(hidden W^T); logits are made in chunks and again in backward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        parts = []
        for rows, target in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
            logits = rows @ weight.t()
            parts.append(logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, weight, targets = ctx.saved_tensors
        parts, grad_weight = [], torch.zeros_like(weight)
        for rows, target, slope in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), grad.split(HEAD_CHUNK), strict=True):
            z = (rows @ weight.t()).softmax(1).neg_()
            z[torch.arange(len(rows)), target] += 1
            z *= slope[:, None]
            parts.append(z @ weight)
            grad_weight.addmm_(z.t(), rows)
        return torch.cat(parts), grad_weight, None
