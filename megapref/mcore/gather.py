"""Moves weights between the ranks of a model, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megapref.mcore import device


def tensor_parallel_size(of_expert: bool = False) -> int:
    """How many ranks share every layer, or every expert."""
    return _sharing(of_expert).size()


def tensor_parallel_rank(of_expert: bool = False) -> int:
    """Which of their shards this process holds."""
    return _sharing(of_expert).rank()


def shards(tensor: Tensor, of_expert: bool = False) -> list[Tensor]:
    """The tensor of every tensor-parallel rank, in order, or of every rank that shares an expert; a collective of that group."""
    return _gathered(tensor, _sharing(of_expert))


def over_experts(tensor: Tensor) -> list[Tensor]:
    """The tensor of every expert-parallel rank, in order; a collective of that group."""
    return _gathered(tensor, parallel_state.get_expert_model_parallel_group())


def _sharing(of_expert: bool) -> dist.ProcessGroup:
    return parallel_state.get_expert_tensor_parallel_group() if of_expert else parallel_state.get_tensor_model_parallel_group()


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [tensor]
    gathered = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(gathered, tensor.contiguous(), group=group)
    return gathered


def expert_parallel_size() -> int:
    """How many ranks share the experts."""
    return parallel_state.get_expert_model_parallel_world_size()


def over_stages(value: Any) -> list[Any]:
    """`value` of every pipeline stage, in order, on all of them."""
    group = parallel_state.get_pipeline_model_parallel_group()
    values = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def from_stage(tensor: Tensor, stage: int) -> None:
    """Fills the tensor with that of pipeline stage `stage`."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        dist.broadcast(tensor, group=group, group_src=stage)


def stage() -> int:
    """Which pipeline stage this process is part of."""
    return parallel_state.get_pipeline_model_parallel_rank()


def to_first_rank(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of all pipeline stages on the first rank, nothing on the others; every rank must consume it to the end.

    `tensors` is what this stage has, the same on its tensor-parallel ranks, and may gather over them and over those that share the experts. One
    data-parallel replica sends.
    """
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        for _ in tensors if expert_parallel_size() > 1 else ():  # to be gathered from
            pass
        return
    stages = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    for source in stages:
        if dist.get_rank() == source:
            for name, tensor in tensors:
                if dist.get_rank() == 0:
                    yield name, tensor
                elif tensor_parallel_rank() == 0:
                    dist.send_object_list([(name, tensor.shape, tensor.dtype)], 0)
                    dist.send(tensor.contiguous(), 0)
            if source != 0 and tensor_parallel_rank() == 0:
                dist.send_object_list([None], 0)
        elif dist.get_rank() == 0:
            yield from _receive(source)


def _receive(source: int) -> Iterator[tuple[str, Tensor]]:
    header: list = [None]
    while True:
        dist.recv_object_list(header, source)
        if header[0] is None:
            return
        name, shape, dtype = header[0]
        tensor = torch.empty(shape, dtype=dtype, device=device.current())
        dist.recv(tensor, source)
        yield name, tensor
