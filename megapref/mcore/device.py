"""Which device this process computes on, and what differs between devices."""

from __future__ import annotations

import os
import resource

import torch


def current() -> torch.device:
    """The device of this process: its local GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend that fits the device."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def peak_memory_bytes() -> int:
    """Most memory in use so far: allocated on the GPU, or resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
