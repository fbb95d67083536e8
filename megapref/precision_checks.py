"""The rules about precision and offloading, for `checks.py`; what the machine can do is checked by `mcore/kernels.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megapref.plugins import show

if TYPE_CHECKING:
    from megapref.config import Config

_MXFP8_ROWS = 128  # of a rank's share of a pack, a multiple of which Transformer Engine's buffers want


def precision_rules(cfg: Config, hf_config: dict[str, Any] | None) -> Iterator[str]:
    """Yields a message for every rule that is broken; those that need the number of layers are left out where `hf_config` is None."""
    p = cfg.precision
    if p.fp8 and p.dtype != "bf16":
        yield f"precision.fp8={p.fp8} is for the matrix products of a bf16 model, but precision.dtype={p.dtype}; use precision={p.name}"
    for name in ("fp8_weights", "bf16_first_layers", "bf16_last_layers", "bf16_layers"):
        if getattr(p, name) and not p.fp8:
            yield f"precision.{name}={show(getattr(p, name))} is about FP8, but precision.fp8=null; use precision=fp8_current, or leave it out"
    if p.fp8 == "mxfp8" and p.fp8_weights:
        yield "precision.fp8_weights=true gathers weights in ways that precision.fp8=mxfp8 has not; leave it out, or use precision=fp8_current"
    for name in ("gradients", "moments"):
        if getattr(p, name) != "fp32" and p.dtype == "fp32":
            yield f"precision.{name}={getattr(p, name)} would be less exact than precision.dtype=fp32; use precision=bf16, or fp32 here too"
    if p.audit.every and p.dtype == "fp32":
        yield f"precision.audit.every={p.audit.every} compares with one precision higher, and precision.dtype=fp32 has none above it; use 0"
    if cfg.reference.fp8_weights and not (p.fp8 and cfg.reference.mode == "resident"):
        yield (
            f"reference.fp8_weights=true needs precision.fp8 and reference.mode=resident, they are {p.fp8 or 'null'} and {cfg.reference.mode}; "
            "leave it out"
        )
    if cfg.reference.mode == "swapped" and p.fp8_weights:
        yield "reference.mode=swapped exchanges weights that precision.fp8_weights=true keeps in FP8; use reference.mode=resident, or false"
    yield from _of_overlap(cfg)
    yield from _of_layers(cfg, (hf_config or {}).get("num_hidden_layers"))


def _of_overlap(cfg: Config) -> Iterator[str]:
    if not cfg.parallel.tp_comm_overlap:
        return
    p = cfg.precision
    if not cfg.parallel.sequence:
        yield "parallel.tp_comm_overlap=true is about what sequence parallelism sends, but parallel.sequence=false; use true, or no overlap"
    if p.dtype == "fp32" or cfg.kernels.layers == "torch":
        option = "precision.dtype=fp32" if p.dtype == "fp32" else "kernels.layers=torch"
        yield f"parallel.tp_comm_overlap=true is done by Transformer Engine's layers, which {option} does not use; use precision=bf16, or no overlap"
    each = cfg.parallel.context * cfg.parallel.tensor * _MXFP8_ROWS
    if p.fp8 == "mxfp8" and cfg.pack_tokens % each:
        multiple = f"a multiple of {each}, {_MXFP8_ROWS} rows for each of a pack's ranks"
        yield f"parallel.tp_comm_overlap=true with precision.fp8=mxfp8 needs packs of {multiple}, pack.max_tokens={cfg.pack.max_tokens} is none"
    if p.fp8 == "blockwise":
        yield "parallel.tp_comm_overlap=true has no buffers for precision.fp8=blockwise; use precision=fp8_current, or no overlap"


def _of_layers(cfg: Config, num_layers: int | None) -> Iterator[str]:
    p, layout = cfg.precision, cfg.parallel
    if layout.offload_layers:
        for name, is_in_the_way in (("pipeline", layout.pipeline > 1), ("recompute", layout.recompute != "none")):
            if is_in_the_way:
                yield (
                    f"parallel.offload_layers={layout.offload_layers} does not go with parallel.{name}={getattr(layout, name)} (Core 0.19); "
                    f"use one of the two"
                )
    if num_layers is None:
        return
    if layout.offload_layers >= num_layers:
        yield f"parallel.offload_layers={layout.offload_layers} must be less than the model's {num_layers} layers; use at most {num_layers - 1}"
    if wrong := [number for number in p.bf16_layers if number >= num_layers]:
        yield f"precision.bf16_layers={p.bf16_layers} names layer {wrong[0]}, the model's are 0 to {num_layers - 1}; leave it out"
    if p.fp8 and len(p.kept_layers(num_layers)) >= num_layers:
        yield f"precision: all of the model's {num_layers} layers would stay in bf16, none in FP8; use precision=bf16, or fewer"
