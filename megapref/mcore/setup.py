"""Process groups, and the few collectives on Python objects that the layers above need.

Data-parallel ranks hold different pairs; the ranks of one model-parallel group (tensor x pipeline) hold parts of one model and see the same pairs.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megapref.config import Parallel
from megapref.mcore import cpu, device

warnings.filterwarnings("ignore", module=r"megatron\.")
from megatron.core import parallel_state, tensor_parallel


def start(parallel: Parallel, seed: int, timeout_minutes: float = 30) -> None:
    """Starts torch.distributed from torchrun's environment (one process without it) and Core's process groups."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    if torch.cuda.is_available():
        torch.cuda.set_device(device.current())
    if not dist.is_initialized():
        dist.init_process_group(device.backend(), timeout=timedelta(minutes=timeout_minutes))
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        create_gloo_process_groups=True,
        distributed_timeout_minutes=int(timeout_minutes),
    )
    with cpu.core_calls():
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def stop() -> None:
    """Ends Core's process groups and torch.distributed."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def is_first_rank() -> bool:
    """Whether this process writes files and talks to the user."""
    return dist.get_rank() == 0


def data_parallel_rank() -> int:
    """Which share of the pairs this process trains on."""
    return parallel_state.get_data_parallel_rank()


def data_parallel_size() -> int:
    """How many shares there are."""
    return parallel_state.get_data_parallel_world_size()


def is_last_stage() -> bool:
    """Whether this process holds the last pipeline stage, where log-probabilities and losses are."""
    return parallel_state.is_pipeline_last_stage()


def gather_over_data_parallel(value: Any) -> list[Any]:
    """`value` of every data-parallel rank, in rank order, on every rank."""
    gathered = [None] * data_parallel_size()
    dist.all_gather_object(gathered, value, group=parallel_state.get_data_parallel_group_gloo())
    return gathered


def agree(error: BaseException | None) -> None:
    """Raises the first rank's error on every rank, when any rank has one; a collective of the whole world."""
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else (isinstance(error, ValueError), f"{error}" or repr(error)))
    for rank, entry in enumerate(errors):
        if entry is not None:
            is_users, message = entry
            raise (ValueError if is_users else RuntimeError)(f"{message}" if is_users else f"rank {rank}: {message}") from error


def on_first_rank(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, run by the first rank alone (None on the others); its error is raised on all."""

    def run(*args, **kwargs):
        result, error = None, None
        if is_first_rank():
            try:
                result = function(*args, **kwargs)
            except (ValueError, OSError) as caught:
                error = caught
        agree(error)
        return result

    return run


def once_per_model(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, run by one rank of each model-parallel group and its result given to the others; an error of any rank is raised on all.

    Made for user code (rewards, judges): it runs once per share of the pairs, and nothing hangs when it raises.
    """

    def run(*args, **kwargs):
        group = parallel_state.get_model_parallel_group()
        source = dist.get_process_group_ranks(group)[0]
        result, error = None, None
        if dist.get_rank() == source:
            try:
                result = function(*args, **kwargs)
            except Exception as caught:  # user code may raise anything; agree() re-raises it on every rank
                error = caught
        agree(error)
        box = [result]
        if group.size() > 1:
            dist.broadcast_object_list(box, src=source, group=group)
        return box[0]

    return run
