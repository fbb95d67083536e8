"""What tools/benchmark.py measures with: a random model and synthetic pairs when it is given none, and words for the machine and the inputs."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
from transformers import Qwen2Config, Qwen2ForCausalLM

from megapref.batch import ModelSpec, TokenPair
from megapref.mcore import device


def make_model(folder: Path, num_layers: int, hidden: int) -> Path:
    """A random Qwen2 with heads of width 32, half as many KV heads, an MLP three times as wide as the model, and 8,192 words."""
    heads = hidden // 32
    shape = dict(num_hidden_layers=num_layers, hidden_size=hidden, intermediate_size=3 * hidden, num_attention_heads=heads)
    options = dict(vocab_size=8192, num_key_value_heads=max(heads // 2, 1), max_position_embeddings=2048, tie_word_embeddings=False)
    Qwen2ForCausalLM(Qwen2Config(**shape, **options)).float().save_pretrained(folder)
    return folder


def synthetic_pairs(number: int, vocab_size: int, seed: int) -> list[TokenPair]:
    """Random tokens with lengths as skewed as those of chat data: log-normal, the two completions' correlated; 340 tokens a pair on average."""
    generator = np.random.default_rng(seed)

    def length(median_tokens: float, sigma: float, least: int, most: int) -> int:
        return int(np.clip(round(median_tokens * np.exp(sigma * generator.standard_normal())), least, most))

    pairs = []
    for _ in range(number):
        prompt, base = length(85, 0.65, 12, 400), np.exp(0.35 * generator.standard_normal())
        sizes = prompt, length(base * 100, 0.55, 20, 300), length(base * 85, 0.60, 20, 300)
        pairs.append(TokenPair(*(generator.integers(3, vocab_size, size).tolist() for size in sizes)))
    return pairs


def hardware() -> dict:
    """The processor as the system names it, its cores, and the accelerator's type if there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "device": str(device.current())}


def describe(spec: ModelSpec) -> dict:
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")
    return {"family": spec.family, "vocab_size": spec.vocab_size} | {name: spec.transformer[name] for name in sizes}


def lengths(pairs: list[TokenPair]) -> dict:
    """Number of pairs and mean tokens of their parts."""
    parts = {"prompt": "prompt_ids", "chosen": "first_ids", "rejected": "second_ids"}
    means = {f"mean_{name}_tokens": float(np.mean([len(getattr(pair, field)) for pair in pairs])) for name, field in parts.items()}
    return {"pairs": len(pairs), **means}
