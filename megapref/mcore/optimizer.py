"""Core's distributed data parallelism and distributed Adam around a model, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megapref import config
from megapref.mcore import cpu

_MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}  # Core's names
_ALL_BUT_0 = 1e-30  # such that the largest number of FP8 over it is finite


def wrap_for_training(chunks: list[torch.nn.Module], precision: config.Precision | None = None) -> list[DistributedDataParallel]:
    """The chunks with gradient buffers that Core sums over data-parallel ranks, in `precision.gradients`."""
    precision = precision or config.Precision()
    options = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=False,
        grad_reduce_in_fp32=precision.gradients == "fp32",
        fp8_param_gather=precision.fp8_weights,
        check_for_nan_in_grad=False,
    )
    with cpu.core_calls():
        wrapped = [DistributedDataParallel(chunk.config, options, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def build_optimizer(chunks: list[DistributedDataParallel], optimizer: config.Optimizer, precision: config.Precision):
    """Core's distributed AdamW over wrapped chunks; its state is split over data-parallel ranks. Norms and biases are not decayed."""
    options = OptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        bf16=precision.dtype == "bf16",
        use_distributed_optimizer=True,
        fp8_recipe=chunks[0].config.fp8_recipe if precision.fp8 else None,
        use_precision_aware_optimizer=precision.moments != "fp32",
        store_param_remainders=False,  # of float32 weights, beside those in bf16: Core (0.19) cannot load them from a checkpoint
        exp_avg_dtype=_MOMENTS[precision.moments],
        exp_avg_sq_dtype=_MOMENTS[precision.moments],
        optimizer_cpu_offload=optimizer.offload > 0,
        optimizer_offload_fraction=optimizer.offload,
    )
    with cpu.core_calls():
        built = get_megatron_optimizer(options, chunks)
    for part in built.chained_optimizers:
        if precision.moments == "fp8" and hasattr(part.optimizer, "_apply_scale"):
            part.optimizer._apply_scale = partial(_apply_scale, part.optimizer._apply_scale)
        for group in part.optimizer.param_groups:
            group["weight_decay"] *= group["wd_mult"]  # 0 for norms and biases; left to the scheduler in Core, which is not used here
        if isinstance(part.optimizer, torch.optim.AdamW):  # neither Transformer Engine nor apex: torch's own single-pass kernel
            for group in part.optimizer.param_groups:
                group["fused"], group["foreach"] = True, False
    return built


def _apply_scale(original: Callable[..., None], name: str, moments: torch.Tensor, *rest) -> None:
    """Transformer Engine's (2.20): puts moments into FP8, scaled.

    Those that are all 0, as of an expert without tokens, would become NaN, divided by the largest: one of them is all but 0 here.
    """
    first = moments.view(-1)[:1]
    first.copy_(first.where(first != 0, _ALL_BUT_0))
    original(name, moments, *rest)


def apply_gradients(optimizer, grad_norm: float, lr: float) -> None:
    """Takes the step along gradients that `prepare_grads` made ready, clipped by their norm: Core's `step()`, which measures it once more."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    for part in optimizer.chained_optimizers:
        clip_grad_by_total_norm_fp32(part.get_parameters(), part.config.clip_grad, grad_norm)
    optimizer.step_with_ready_grads()


def learning_rate(step: int, total_steps: int, optimizer: config.Optimizer) -> float:
    """The rate of optimizer step `step` (from 1): linear warmup, then constant, or linear or cosine decay towards `min_lr`.

    The decay starts at the peak and would reach `min_lr` one step after the last, so that no step is done in vain.
    """
    if step <= optimizer.warmup_steps:
        return optimizer.lr * step / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    done = (step - 1 - optimizer.warmup_steps) / (total_steps - optimizer.warmup_steps)
    left = 1 - done if optimizer.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * left
