"""What this process computes on, and with which kernels: for environment.json and bug reports."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import megatron.core.optimizer
import torch
import torch.nn.functional as F
from megatron.core.transformer import attention

from megapref.config import Kernels, Precision
from megapref.mcore import cpu, device
from megapref.mcore.kernels import Choice, choose, machine, no_decoding_attention

# What kernels are reported for where no run's model is known: Llama's layers, in bf16.
_LLAMA = {"hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 14336, "gated_linear_unit": True, "activation_func": F.silu}


def report(choice: Choice | None = None) -> dict[str, Any]:
    """`device` (what there is), `libraries` (version, or why not) and `kernels` (operation: what computes it, and why nothing faster).

    `choice` is that of a run's model; without one it is that of a Llama in bf16.
    """
    return {"device": device_report(), "libraries": library_report(), "kernels": kernel_report(choice)}


def summary() -> str:
    """`report` in one line."""
    found = device_report()
    gpus = f"{len(found['gpus'])} x {found['gpus'][0]['name']}" if found["gpus"] else "CPU"
    return f"computes on {gpus}, {found['collectives']}; Adam: {kernel_report()['Adam']['used']}"


def device_report() -> dict[str, Any]:
    """GPUs with their memory, driver, CUDA, cuDNN, NCCL (None where there is none) and what collectives go through."""
    present = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if present else []
    return {
        "gpus": [
            {"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1), "compute_capability": f"{gpu.major}.{gpu.minor}"}
            for gpu in gpus
        ],
        "driver": _driver(),
        "torch_built_for_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if present else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if present else None,
        "collectives": device.backend(),
    }


def library_report() -> dict[str, str]:
    """The version of each optional library that works here, otherwise the reason why it does not."""
    return machine().libraries


def kernel_report(choice: Choice | None = None) -> dict[str, dict[str, str]]:
    """Of each operation that has fused kernels somewhere: `used`, what computes it in this process, and `why` nothing faster does."""
    choice = choice or choose(_LLAMA, 1, Precision(dtype="bf16"), Kernels(), machine())
    te, plain = "Transformer Engine", "separate torch operations"
    adam = megatron.core.optimizer.Adam
    kernels = {
        "layers": (te if choice.te_layers else "torch linear", choice.why.get("layers", "")),
        "attention, training": (
            f"{te}: cuDNN, all segments of a pack in one call" if choice.te_attention else "torch scaled_dot_product_attention",
            choice.why.get("attention", ""),
        ),
        "attention, decoding": _decoding(),
        "norm": (
            f"{te}, in the linear layer that follows" if choice.te_layers else "torch rms_norm, layer_norm",
            "" if choice.te_layers else choice.why.get("layers", ""),
        ),
        "rope": ("fused" if choice.fused_rope else plain, choice.why.get("rope", "")),
        "bias and activation": ("fused" if choice.fused_activation else plain, choice.why.get("activation", "")),
        "bias and dropout": ("fused" if choice.fused_bias_dropout else plain, "" if choice.fused_bias_dropout else "there is no GPU"),
        "gradient accumulation": (
            "in the matrix product" if choice.fused_gradients else "after the matrix product",
            choice.why.get("gradient accumulation", ""),
        ),
        "LM head": ("torch, in chunks of rows", "the rows that predict a completion token alone, in the run's dtype, never in FP8"),
        "Adam": (
            f"{adam.__module__.split('.')[0]} {adam.__name__}",
            "neither Transformer Engine nor apex works here" if adam.__module__.startswith("torch.") else "",
        ),
    }
    return {operation: {"used": used, "why": why} for operation, (used, why) in kernels.items()}


def _decoding() -> tuple[str, str]:
    if cpu.ACTIVE:
        return "torch on the paged cache", "there is no GPU"
    if (missing := no_decoding_attention(machine())) is not None:
        return "none: generation is refused", missing
    return attention.flash_attn_with_kvcache.__module__ if attention.flash_attn_with_kvcache else "flash-attn 3 or 4", ""


def _driver() -> str | None:
    """The NVIDIA driver's version, None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None
