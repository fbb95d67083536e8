"""What this process computes on, and with which kernels: for environment.json and bug reports."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import megatron.core.optimizer
import torch
from megatron.core.transformer import attention

from megapref.mcore import cpu, device
from megapref.mcore.model import FUSIONS

# Optional libraries: name, distribution, module that has to work. Without a GPU importing them can break Core itself: they are left alone.
_OPTIONAL = (
    ("Transformer Engine", "transformer-engine", "transformer_engine.pytorch"),
    ("apex", "apex", "amp_C"),  # its compiled kernels, which PyPI's unrelated apex has not
    ("flash-attn", "flash-attn", "flash_attn"),
    ("flash-attn 3", "flash-attn-3", "flash_attn_3"),
    ("flash-attn 4", "flash-attn-4", "flash_attn.cute"),
)


def report() -> dict[str, Any]:
    """`device` (what there is), `libraries` (version, or why not) and `kernels` (operation: what computes it, and why nothing faster)."""
    return {"device": device_report(), "libraries": library_report(), "kernels": kernel_report()}


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
    return {name: library_state(distribution, module, torch.cuda.is_available()) for name, distribution, module in _OPTIONAL}


def library_state(distribution: str, module: str, has_gpu: bool) -> str:
    """A version, or why the library is not used. It is imported only where a GPU is."""
    try:
        installed = version(distribution)
    except PackageNotFoundError:
        return "not installed"
    if not has_gpu:
        return f"{installed} is installed and not imported: there is no GPU"
    try:
        importlib.import_module(module)
    except Exception as error:  # compiled extensions fail in many ways; whatever it is goes into the report
        return f"{installed} does not work: {type(error).__name__}: {error}"
    return installed


def kernel_report() -> dict[str, dict[str, str]]:
    """Of each operation that has fused kernels somewhere: `used`, what computes it in this process, and `why` nothing faster does."""
    adam = megatron.core.optimizer.Adam
    of_adam = "neither Transformer Engine nor apex works here" if adam.__module__.startswith("torch.") else ""
    paged = attention.flash_attn_with_kvcache
    if cpu.ACTIVE:
        decoding = _kernel("torch on the paged cache", "there is no GPU")
    elif paged is None:
        decoding = _kernel("none: generation will fail", "Core's engine needs flash-attn 2.7.3 or newer, 3 or 4")
    else:
        decoding = _kernel(paged.__module__, "")
    kernels = {
        "attention, training": _kernel("torch scaled_dot_product_attention", "segments that share a prompt; other kernels are not connected"),
        "attention, decoding": decoding,
        "norm": _kernel("torch rms_norm, layer_norm", "sequence parallelism and zero-centred weights; other kernels are not connected"),
        "Adam": _kernel(f"{adam.__module__.split('.')[0]} {adam.__name__}", of_adam),
    }
    for option, is_on in FUSIONS.items():
        kernels[option] = _kernel("fused", "") if is_on else _kernel("separate torch operations", "switched off in megapref/mcore/model.py")
    return kernels


def _kernel(used: str, why: str) -> dict[str, str]:
    return {"used": used, "why": why}


def _driver() -> str | None:
    """The NVIDIA driver's version, None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None
