"""Process groups, and the few collectives on Python objects that the layers above need.

Data-parallel ranks hold different shares of the pairs. The ranks of one share (tensor x pipeline x context) are given the same pairs: they hold
parts of one model, and parts of the packs.
"""

from __future__ import annotations

import logging
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import chain, islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from megapref.config import Parallel
from megapref.mcore import cpu, device, overlap
from megapref.mcore.watch import Watch

_TIMEOUT = timedelta(minutes=30)  # of a collective, where nobody watches
_WATCHED = timedelta(days=7)  # as long as others get on, a collective may wait for its last rank

_watches: list[Watch] = []


def start(parallel: Parallel, seed: int, stuck_after: float | None = None, stuck_words: str = "") -> None:
    """Starts torch.distributed from torchrun's environment (one process without it) and Core's process groups.

    With `stuck_after` (seconds, in words) a standstill of all ranks for so long ends them with a report. ValueError where ranks do not come.
    """
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    if torch.cuda.is_available():
        torch.cuda.set_device(device.current())
    timeout = _WATCHED if stuck_after else _TIMEOUT
    if not dist.is_initialized():
        store, rank, world_size = _meet(timedelta(seconds=stuck_after) if stuck_after else _TIMEOUT)
        if stuck_after:
            _watches.append(Watch(store.clone(), rank, world_size, stuck_after, stuck_words))
        dist.init_process_group(device.backend(), store=store, rank=rank, world_size=world_size, timeout=timeout)
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_parts,
        create_gloo_process_groups=True,
        distributed_timeout_minutes=int(timeout.total_seconds() / 60),
    )
    with cpu.core_calls():
        tensor_parallel.model_parallel_cuda_manual_seed(seed, use_cudagraphable_rng=torch.cuda.is_available())


def sampling_groups(tensor: int) -> ProcessGroupCollection:
    """Process groups of a model in `tensor` parts on neighbouring ranks, and copies of it on the others; made by all ranks together."""
    grid = HyperCommGrid([tensor, 1, dist.get_world_size() // tensor], ["tp", "one", "dp"], backend=device.backend())
    groups = ProcessGroupCollection()
    groups.tp = groups.mp = groups.tp_cp = groups.tp_ep = groups.tp_ep_pp = groups.expt_tp = grid.create_pg("tp")
    groups.pp = groups.cp = groups.ep = grid.create_pg("one")
    groups.dp = groups.dp_cp = groups.expt_dp = grid.create_pg("dp")
    groups.tp_dp_cp = dist.group.WORLD
    groups.embd = groups.pos_embd = None
    return groups


def _meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    try:
        return next(dist.rendezvous("env://", timeout=timeout))
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"not all of the {os.environ['WORLD_SIZE']} ranks came to {where} within {timeout} ({str(error).partition(chr(10))[0]}); "
            "look for the rank that did not start, or whether that address is reached from every machine"
        ) from error


def failed(error: BaseException) -> str | None:
    """Tells the other ranks of this one's error; returns what another told first, where it is another error."""
    return _watches[0].failed(error) if _watches else None


def stop() -> None:
    """Ends Core's process groups and torch.distributed."""
    for watch in _watches:
        watch.stop("talking")
    overlap.stop()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    while _watches:
        _watches.pop().stop("judging")


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


def gather_on_first_rank(value: Any) -> list[Any] | None:
    """`value` of every process, in rank order, on the first rank."""
    gathered = [None] * dist.get_world_size() if is_first_rank() else None
    dist.gather_object(value, gathered)
    return gathered


def largest(number: int) -> int:
    """The largest of every process's number, on every process."""
    return largest_each([number])[0]


def largest_each(numbers: Sequence[int]) -> list[int]:
    """The largest of every process's first number, second number and so on, on every process."""
    most = torch.tensor(numbers, device=device.current())
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.tolist()


def gather_over_share(value: Any) -> list[Any]:
    """`value` of every rank of the share of the pairs, on every rank of it; neighbouring tensor-parallel ranks are neighbours."""
    for group in (parallel_state.get_model_parallel_group(), parallel_state.get_context_parallel_group()):
        gathered = [None] * group.size()
        dist.all_gather_object(gathered, value, group=group)
        value = gathered
    return list(chain(*value))


def share_size() -> int:
    """How many ranks there are in a share of the pairs."""
    return parallel_state.get_model_parallel_group().size() * parallel_state.get_context_parallel_world_size()


def rank_in_share() -> int:
    """This process's number in `gather_over_share`."""
    of_model = parallel_state.get_model_parallel_group()
    return parallel_state.get_context_parallel_rank() * of_model.size() + dist.get_group_rank(of_model, dist.get_rank())


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
    """`function`, run by one rank of each share of the pairs and its result given to the share's others; an error of any rank is raised on all.

    Made for user code (rewards, judges): nothing hangs when it raises.
    """

    def run(*args, **kwargs):
        box = [_agreed(function, _is_first_of_share)(*args, **kwargs)]
        for group in (parallel_state.get_model_parallel_group(), parallel_state.get_context_parallel_group()):
            if group.size() > 1:
                dist.broadcast_object_list(box, group=group, group_src=0)
        return box[0]

    return run


def _is_first_of_share() -> bool:
    return rank_in_share() == 0


def once_per_node(function: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """`function` of lists to a list as long, run by one process of each node on the joined shares of the pairs of that node's processes.

    Each process gets its share's part of the result; an error of any is raised on all. Made for what loads a model, which so is there once.
    """

    def run(*columns: list[Any]) -> list[Any]:
        node = f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', '')}"  # torchrun's number of the node
        gathered = gather_over_world((data_parallel_rank(), (node, columns)) if _is_first_of_share() else None)
        shares = dict(filter(None, gathered))
        mine = sorted(share for share, (at, _) in shares.items() if at == node)

        def of_node() -> dict[int, list[Any]]:
            joined = [list(chain(*parts)) for parts in zip(*(shares[share][1] for share in mine), strict=True)]
            results = iter(function(*joined))
            return {share: list(islice(results, len(shares[share][1][0]))) for share in mine}

        here = _agreed(of_node, lambda: _is_first_of_share() and mine[0] == data_parallel_rank())()
        return next(results[data_parallel_rank()] for results in gather_over_world(here) if results and data_parallel_rank() in results)

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
