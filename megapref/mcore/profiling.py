"""Traces of single steps, with ranges that are named as the phases of a step and the parts of the work on a pack.

`torch`: its profiler writes a Chrome trace and a table of operations for each step and rank. `nvtx`: the ranges alone, between cudaProfilerStart
and Stop, for a run that was started by `nsys profile --capture-range=cudaProfilerApi`. Outside of traced steps nothing is entered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import configure_nvtx_profiling
from torch.profiler import ProfilerActivity

from megapref import phases
from megapref.config import Profile
from megapref.mcore import setup

TABLE_ROWS = 50


def check(profile: Profile) -> None:
    """Raises ValueError where this machine cannot make the traces that are asked for."""
    if profile.steps and profile.tool == "nvtx" and not torch.cuda.is_available():
        raise ValueError("profile.tool=nvtx marks ranges of what a GPU does, and there is none; use profile.tool=torch")


@contextmanager
def traced(profile: Profile, step: int, folder: Path) -> Iterator[None]:
    """Traces what is done inside where the step and this rank are to be traced; then a collective of all ranks. An error inside is not traced.

    Errors: ValueError where the trace cannot be written.
    """
    if step not in profile.steps:
        yield
        return
    mine = dist.get_rank() in profile.ranks
    with _tool(profile, mine) as profiler, _ranges() if mine else nullcontext():
        yield
        torch.cuda.synchronize()
    setup.on_every_rank(_write)(profiler, folder / f"step_{step:06d}_rank_{dist.get_rank()}")


def _tool(profile: Profile, mine: bool) -> AbstractContextManager[torch.profiler.profile | None]:
    if not mine:
        return nullcontext()
    if profile.tool == "nvtx":
        return _captured()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    return torch.profiler.profile(activities=activities, profile_memory=profile.memory, with_stack=profile.stacks)


@contextmanager
def _captured() -> Iterator[None]:
    torch.cuda.profiler.start()
    try:
        yield
    finally:
        torch.cuda.profiler.stop()


@contextmanager
def _ranges() -> Iterator[None]:
    """Names phases, packs and, for NVTX, what Core names of its own."""
    backward = schedules.backward_step

    def named_backward(*args, **kwargs):
        with _range("pack: backward"):
            return backward(*args, **kwargs)

    def pack_range(name: str) -> AbstractContextManager:
        return _range(f"pack: {name}")

    phases.around_phases.append(_range)
    phases.around_packs.append(pack_range)
    schedules.backward_step = named_backward  # Core's schedules look it up for every pack, and have no hook there
    configure_nvtx_profiling(True)
    try:
        yield
    finally:
        configure_nvtx_profiling(False)
        schedules.backward_step = backward
        phases.around_packs.remove(pack_range)
        phases.around_phases.remove(_range)


@contextmanager
def _range(name: str) -> Iterator[None]:
    torch.cuda.nvtx.range_push(name)  # a stand-in without a GPU
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        torch.cuda.nvtx.range_pop()


def _write(profiler: torch.profiler.profile | None, path: Path) -> None:
    """`path`.json.gz for chrome://tracing or ui.perfetto.dev, `path`.txt with the operations that took longest themselves."""
    if profiler is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(f"{path}.json.gz")
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=TABLE_ROWS, max_name_column_width=60)
    path.with_suffix(".txt").write_text(f"{table}\n")
