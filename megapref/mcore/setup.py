"""Process groups, and the few collectives on Python objects that the layers above need.

Data-parallel ranks hold different pairs; the ranks of one model-parallel group (tensor x pipeline) hold parts of one model and see the same pairs.
"""

from __future__ import annotations

import logging
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from itertools import chain, islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megapref.config import Parallel
from megapref.mcore import cpu, device


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


def gather_over_data_parallel(value: Any) -> list[Any]:
    """`value` of every data-parallel rank, in rank order, on every rank."""
    gathered = [None] * data_parallel_size()
    dist.all_gather_object(gathered, value, group=parallel_state.get_data_parallel_group_gloo())
    return gathered


def gather_over_world(value: Any) -> list[Any]:
    """`value` of every process, in rank order, on every process."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def largest(number: int) -> int:
    """The largest of every process's number, on every process."""
    numbers = torch.tensor(number, device=device.current())
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


def from_last_stage(value: Any) -> Any:
    """`value` of the last stage of the pipeline, on all of its stages."""
    box, group = [value], parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        dist.broadcast_object_list(box, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return box[0]


def agree(error: Exception | None) -> None:
    """Raises the first rank's error on every rank, when any rank has one; a collective of the whole world.

    The user's errors (ValueError, OSError) become a ValueError with their message, others a RuntimeError with their traceback.
    """
    entry = None
    if error is not None:
        is_users = isinstance(error, ValueError | OSError)
        entry = (is_users, str(error) or repr(error) if is_users else "".join(traceback.format_exception(error)))
    entries = gather_over_world(entry)
    for rank, first in enumerate(entries):
        if first is not None:
            if rank == dist.get_rank() and isinstance(error, ValueError):
                raise error  # with the line it comes from
            is_users, message = first
            raise ValueError(message) if is_users else RuntimeError(f"rank {rank}: {message}")


def on_every_rank(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, run by every rank, none of which may wait for another in it; an error of any is raised on all."""
    return _agreed(function, lambda: True)


def on_first_rank(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, run by the first rank alone (None on the others); its error is raised on all."""
    return _agreed(function, is_first_rank)


def once_per_model(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, run by one rank of each model-parallel group and its result given to the others; an error of any rank is raised on all.

    Made for user code (rewards, judges): it runs once per share of the pairs, and nothing hangs when it raises.
    """

    def source() -> int:
        return dist.get_process_group_ranks(parallel_state.get_model_parallel_group())[0]

    def run(*args, **kwargs):
        box = [_agreed(function, lambda: dist.get_rank() == source())(*args, **kwargs)]
        group = parallel_state.get_model_parallel_group()
        if group.size() > 1:
            dist.broadcast_object_list(box, src=source(), group=group)
        return box[0]

    return run


def once_per_node(function: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """`function` of lists to a list as long, run by one process of each node on the joined shares of the pairs of that node's processes.

    Each process gets its share's part of the result; an error of any is raised on all. Made for what loads a model, which so is there once.
    """

    def run(*columns: list[Any]) -> list[Any]:
        source = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())[0]
        node = f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', '')}"  # torchrun's number of the node
        shares = gather_over_world((node, columns) if dist.get_rank() == source else None)
        mine = [rank for rank, share in enumerate(shares) if share is not None and share[0] == node]

        def of_node() -> dict[int, list[Any]]:
            joined = [list(chain(*parts)) for parts in zip(*(shares[rank][1] for rank in mine), strict=True)]
            results = iter(function(*joined))
            return {rank: list(islice(results, len(shares[rank][1][0]))) for rank in mine}

        here = _agreed(of_node, lambda: mine[:1] == [dist.get_rank()])()
        return next(results[source] for results in gather_over_world(here) if results and source in results)

    return run


def _agreed(function: Callable[..., Any], is_here: Callable[[], bool]) -> Callable[..., Any]:
    def run(*args, **kwargs):
        result, error = None, None
        if is_here():
            try:
                result = function(*args, **kwargs)
            except Exception as caught:  # whatever it is: without agree() the other ranks would wait for ever
                error = caught
        agree(error)
        return result

    return run
