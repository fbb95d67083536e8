"""Figures of `tools/benchmark.py --suite gpu`: what a step computes and reads at least, and the goals. docs/benchmarks/gpu_suite.md has the formulas.

Operations and data sheets are those of the planner (megapref/plan/).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megapref.batch import ModelSpec, TokenPair
from megapref.plan.hardware import Gpu
from megapref.plan.shapes import Layout
from megapref.plan.timing import cache_per_token, model_flops
from megapref.plan.workload import Job, PairLengths, pair_sizes, total

MFU_SHAPES, FP8_SHAPES = ("qwen2.5-1.5b", "qwen2.5-3b", "qwen3-4b"), ("qwen3-4b", "llama-3.1-8b")
DECODE_BATCH = 256


@dataclass(frozen=True)
class Work:
    """What a training step has to do, whatever its layout adds: real tokens, a shared prompt once or for each completion, and operations."""

    pairs: float
    tokens: int
    unshared_tokens: int
    flops: float

    @classmethod
    def of(cls, spec: ModelSpec, pairs: Sequence[TokenPair], share_prompt: bool) -> Work:
        """Of DPO or SFT on the pairs, those without a second side counting half."""
        lengths = [PairLengths(len(pair.prompt_ids), len(pair.first_ids), len(pair.second_ids)) for pair in pairs]
        sizes, unshared = (total([pair_sizes(each, shared) for each in lengths]) for shared in (share_prompt, False))
        return cls(sum(1.0 if each.second else 0.5 for each in lengths), sizes.tokens, unshared.tokens, model_flops(spec, sizes))


def step_figures(work: Work, seconds: float, peak_flops: float | None) -> dict[str, float | None]:
    """Rates of a step that takes so long; `peak_flops` (None: not known) is the rate of the data sheet."""
    return {
        "seconds": seconds,
        "tokens_per_s": work.tokens / seconds,
        "unshared_tokens_per_s": work.unshared_tokens / seconds,
        "pairs_per_s": work.pairs / seconds,
        "tflops": work.flops / seconds / 1e12,
        "mfu": work.flops / seconds / peak_flops if peak_flops else None,
    }


def decode_bytes(spec: ModelSpec, model: torch.nn.Module, dtype: str, context: float) -> float:
    """Bytes that have to be read for one more token of every completion: all weights, and keys and values of the `context` tokens of all together.

    An embedding that is not the head too is left out: a row of it is read.
    """
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if not spec.tied:
        weights -= sum(w.numel() * w.element_size() for name, w in model.named_parameters() if "word_embeddings" in name)
    return weights + context * cache_per_token(spec, Job((), dtype=dtype), Layout())


def decode_figures(batch: int, step_bytes: float, seconds: float, gpu: Gpu | None) -> dict[str, float | None]:
    """Rates of one token for each of the batch in so many seconds; the share of the memory bandwidth that reading `step_bytes` would need."""
    share = step_bytes / gpu.bandwidth / seconds if gpu else None
    return {"seconds": seconds, "tokens_per_s": batch / seconds, "step_bytes": step_bytes, "hbm_share": share}


def goals(rows: Sequence[dict[str, Any]], max_tokens: int) -> list[dict[str, Any]]:
    """Every goal with what was measured of it: `goal`, `target`, `of` (which rows) and `measured`, None where a row or a data sheet is missing."""
    known = {(row["shape"], row["precision"], row["step"]): row for row in rows if row["status"] == "ok"}
    found = [*_training_goals(known, max_tokens), *_decode_goals(known)]
    return found + [_line(name, "no row", None) for name in _NAMES if name not in {line["goal"] for line in found}]


_NAMES = {
    "bf16 MFU, 1.5B to 4B, packs of 4,096": 0.45,
    "FP8 tokens/s per those of bf16, 4B and more": 1.3,
    "time saved per tokens saved by sharing the prompt": 0.9,
    "tokens/s of DPO with a live reference per those of SFT": 0.70,
    "tokens/s of DPO with a cached reference per those of SFT": 0.95,
    f"decoding, batch {DECODE_BATCH}: share of the memory bandwidth": 0.40,
}


def _training_goals(known: dict[tuple[str, str, str], dict[str, Any]], max_tokens: int) -> Iterator[dict[str, Any]]:
    mfu, fp8, shared, live, cached, _ = _NAMES
    for shape, precision in dict.fromkeys((shape, precision) for shape, precision, _ in known):
        own = {step: row for (s, p, step), row in known.items() if (s, p) == (shape, precision)}
        where = f"{shape} {precision}"
        if shape in MFU_SHAPES and precision == "bf16" and max_tokens == 4096:
            best = max((row for step, row in own.items() if "live" not in step and row.get("mfu")), key=lambda row: row["mfu"], default=None)
            yield _line(mfu, f"{where}, {best['step'] if best else 'no row'}", best and best["mfu"])
        if shape in FP8_SHAPES and "fp8" in precision:
            plain = known.get((shape, "bf16", "dpo cached, shared"))
            yield _line(fp8, where, _ratio(own.get("dpo cached, shared"), plain, "tokens_per_s"))
        for kind in ("live", "cached"):
            apart, together = own.get(f"dpo {kind}, packed"), own.get(f"dpo {kind}, shared")
            if apart and together:
                time, tokens = together["seconds"] / apart["seconds"], together["tokens"] / apart["tokens"]
                yield _line(shared, f"{where}, {kind}", (1 - time) / (1 - tokens))
            if ratio := _ratio(apart, own.get("sft, packed"), "tokens_per_s"):
                yield _line(live if kind == "live" else cached, where, ratio)


def _decode_goals(known: dict[tuple[str, str, str], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for (shape, precision, step), row in known.items():
        if step == f"decode {DECODE_BATCH}":
            yield _line(list(_NAMES)[-1], f"{shape} {precision}", row["hbm_share"])


def _line(goal: str, of: str, measured: float | None) -> dict[str, Any]:
    return {"goal": goal, "target": _NAMES[goal], "of": of, "measured": measured}


def _ratio(row: dict[str, Any] | None, other: dict[str, Any] | None, key: str) -> float | None:
    return row[key] / other[key] if row and other else None
