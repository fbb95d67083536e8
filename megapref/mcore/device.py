"""Which device this process computes on, and what differs between devices."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def current() -> torch.device:
    """The device of this process: its local GPU, or the CPU. ValueError where more processes than GPUs were started."""
    return torch.device("cuda", _own_gpu()) if torch.cuda.is_available() else torch.device("cpu")


@cache
def _own_gpu() -> int:
    return gpu_number(os.environ, torch.cuda.device_count())


def gpu_number(environment: Mapping[str, str], visible: int) -> int:
    """Which of the GPUs that this process sees is its own: that of its rank on the machine, or the one that a launcher has left visible.

    ValueError where there is none left for it.
    """
    local = int(environment.get("LOCAL_RANK", 0))
    if local < visible:
        return local
    if visible == 1 and "TORCHELASTIC_RUN_ID" not in environment:  # such as by srun --gpus-per-task=1; torchrun shows all GPUs to all
        return 0
    raise ValueError(
        f"process {local} of this machine (LOCAL_RANK, from 0) has no GPU: there are {visible}; start at most {visible} processes a machine, "
        "or set CUDA_VISIBLE_DEVICES= (to nothing) to compute on the CPU"
    )


def backend() -> str:
    """The torch.distributed backend that fits the device."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def peak_memory_bytes() -> int:
    """Most memory in use since `forget_peak_memory`, else since the start: allocated on the GPU, or resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Where Linux tells it: getrusage's number may be that of the process that started this one.
    lines = [line.split() for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")] if _STATUS.exists() else []
    return int(lines[0][1]) * 1024 if lines else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak_memory() -> bool:
    """Makes `peak_memory_bytes` begin anew, with what is in use now; False where the system does not let this process do so."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        _CLEAR_REFS.write_text("5")  # man 5 proc: resets the peak of resident memory (VmHWM)
    except OSError:
        return False
    return True


def reserved_memory_bytes() -> int | None:
    """Most memory that torch held of the GPU since `forget_peak_memory`, in use or not; None on CPU."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None


def free_memory_bytes() -> int | None:
    """Memory of the GPU that nobody holds; None on CPU."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
