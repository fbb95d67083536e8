"""The weights of a model in the layout that it is trained in, copied into a model in tensor-parallel parts alone."""

from __future__ import annotations

import torch
from torch.nn import Module

from megapref.batch import ModelSpec
from megapref.convert import mapping
from megapref.mcore import gather
from megapref.mcore.model import named_weights


@torch.no_grad()
def refit(source: list[Module], target: list[Module], spec: ModelSpec, tensor: int) -> None:
    """Fills `target`, in `tensor` parts on neighbouring ranks, with the weights of `source`, one tensor at a time; a collective of all ranks.

    `tensor` divides the tensor-parallel size of `source`: each stage of a pipeline joins or keeps its parts and hands them to the others.
    """
    size, part = gather.tensor_parallel_size(), gather.tensor_parallel_rank() % tensor
    wanted, held = (
        {(name, tuple(numbers.values())): parameter for name, numbers, parameter in named_weights(chunks)} for chunks in (target, source)
    )
    for stage, keys in enumerate(gather.over_stages(list(held))):
        for name, place in keys:
            if (name, place) not in wanted:
                continue  # the last stage's copy of a tied embedding
            parameter = wanted[name, place]
            if stage == gather.stage():
                mine, kind = held[name, place], spec.weights[name][0]
                if tensor != size and kind != "replicated":
                    mine = mapping.to_shard(kind, mapping.from_shards(kind, gather.shards(mine), spec), spec, tensor, part)
                parameter.copy_(mine)
            gather.from_stage(parameter, stage)
