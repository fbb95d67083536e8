"""Shapes of published models for `tools/benchmark.py --suite gpu`: the numbers of their config.json, for random weights; the last two for CPUs."""

from __future__ import annotations

from typing import Any

import torch

from megapref.batch import ModelSpec
from megapref.convert.families import to_spec
from megapref.mcore.model import set_weight


def _shape(model_type: str, layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int, tied: bool, **more: Any) -> dict[str, Any]:
    sizes = dict(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=ffn, num_attention_heads=heads, num_key_value_heads=groups)
    return dict(model_type=model_type, vocab_size=vocab, tie_word_embeddings=tied, max_position_embeddings=8192, **sizes, **more)


# In the order in which the goals of docs/benchmarks/gpu_suite.md need them.
SHAPES = {
    "qwen2.5-1.5b": _shape("qwen2", 28, 1536, 8960, 12, 2, 151936, tied=True),
    "qwen3-4b": _shape("qwen3", 36, 2560, 9728, 32, 8, 151936, tied=True, head_dim=128),
    "qwen2.5-0.5b": _shape("qwen2", 24, 896, 4864, 14, 2, 151936, tied=True),
    "llama-3.2-1b": _shape("llama", 16, 2048, 8192, 32, 8, 128256, tied=True, head_dim=64),
    "qwen2.5-3b": _shape("qwen2", 36, 2048, 11008, 16, 2, 151936, tied=True),
    "llama-3.1-8b": _shape("llama", 32, 4096, 14336, 32, 8, 128256, tied=False, head_dim=128),
    "small": _shape("qwen2", 6, 256, 768, 8, 4, 8192, tied=False),
    "tiny": _shape("qwen2", 2, 64, 192, 4, 2, 1024, tied=False),
}


def spec_of(name: str, num_layers: int | None = None) -> ModelSpec:
    """The model of that name, with `num_layers` of its layers where they are given."""
    return to_spec(SHAPES[name] | ({"num_hidden_layers": num_layers} if num_layers else {}))


@torch.no_grad()
def randomise(chunks: list[torch.nn.Module]) -> None:
    """Fills a model that was built without weights: matrices from a normal distribution of width 0.02, norms with 1, biases with 0."""
    for chunk in chunks:
        for name, weight in chunk.named_parameters():
            values = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            set_weight(weight, values.normal_(0.0, 0.02) if weight.dim() > 1 else values.fill_(0.0 if name.endswith("bias") else 1.0))
