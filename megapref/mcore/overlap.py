"""Tensor parallelism's messages beside matrix products: Transformer Engine's userbuffers, for layers that are given packs of one length.

A buffer holds the rows of one whole pack: other forward passes (samples, a judge's questions, an audit in other types) send theirs as without it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import Module

from megapref.config import Parallel, Precision

_BASE = "transformer_engine.pytorch.module.base"
_OF_FORWARD = ("ub_overlap_ag_fprop", "ub_overlap_rs_fprop")  # what a layer of Transformer Engine overlaps in its forward pass


def start(parallel: Parallel, precision: Precision, pack_tokens: int, hidden_size: int) -> None:
    """Makes the buffers, before any layer that uses them; a collective of all ranks, which does nothing the second time.

    `pack_tokens` are those of a whole pack, of which context-parallel ranks have equal shares.
    """
    from transformer_engine.pytorch.module import base

    if base.is_ub_initialized():
        return
    mode = base.UserBufferQuantizationMode
    base.initialize_ub(
        shape=[pack_tokens // parallel.context, hidden_size],
        tp_size=parallel.tensor,
        # Layers that stay in bf16 have buffers of their own.
        quantization_modes=([mode.FP8] if precision.fp8 else []) + ([mode.NONE] if precision.fp8 is None or precision.keeps_layers else []),
        dtype=torch.bfloat16,
        bootstrap_backend="nccl",
    )


def stop() -> None:
    """Frees the buffers, if there are any."""
    if (base := sys.modules.get(_BASE)) and base.is_ub_initialized():
        base.destroy_ub()


@contextmanager
def paused(chunks: list[Module]) -> Iterator[None]:
    """Inside, forward passes of the chunks may have any number of rows. Nothing may be trained meanwhile."""
    layers = [module for chunk in chunks for module in chunk.modules() if hasattr(module, _OF_FORWARD[0])]  # experts have a name and no flags
    before = [{name: getattr(layer, name) for name in _OF_FORWARD} for layer in layers]
    try:
        for layer in layers:
            vars(layer).update(dict.fromkeys(_OF_FORWARD, False))
        yield
    finally:
        for layer, flags in zip(layers, before, strict=True):
            vars(layer).update(flags)
