"""The weights of a model in the layout that it is trained in, copied into a model in tensor-parallel parts alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Module

from megapref.batch import ModelSpec
from megapref.convert import mapping
from megapref.mcore import gather
from megapref.mcore.model import named_weights


def whole_experts(numbers: dict[str, int], tensor: Tensor, spec: ModelSpec) -> Iterator[tuple[dict[str, int], Tensor]]:
    """A layer's tensor as it is; an expert's with those in its place on the ranks that share the experts, each with its numbers. A collective."""
    fellows = _fellows(numbers, spec)
    return zip(fellows, gather.over_experts(tensor) if len(fellows) > 1 else [tensor], strict=True)


def _fellows(numbers: dict[str, int], spec: ModelSpec) -> list[dict[str, int]]:
    if "expert" not in numbers:
        return [numbers]
    local = spec.transformer["num_moe_experts"] // gather.expert_parallel_size()
    return [numbers | {"expert": numbers["expert"] % local + rank * local} for rank in range(gather.expert_parallel_size())]


@torch.no_grad()
def refit(source: list[Module], target: list[Module], spec: ModelSpec, tensor: int) -> None:
    """Fills `target`, in `tensor` parts on neighbouring ranks, with the weights of `source`, one tensor at a time; a collective of all ranks.

    `tensor` divides the tensor-parallel size of `source`: each stage of a pipeline joins or keeps its parts and hands them to the others.
    """
    part = gather.tensor_parallel_rank() % tensor
    wanted, held = (
        {(name, tuple(numbers.items())): parameter for name, numbers, parameter in named_weights(chunks)} for chunks in (target, source)
    )
    for stage, keys in enumerate(gather.over_stages(list(held))):
        for name, place in keys:
            if stage == gather.stage():
                found = list(whole_experts(dict(place), held[name, place].detach(), spec))
            else:
                found = [(numbers, None) for numbers in _fellows(dict(place), spec)]
            for numbers, mine in found:
                parameter = wanted.get((name, tuple(numbers.items())))
                if parameter is None:
                    continue  # the last stage's copy of a tied embedding
                if mine is not None:
                    kind, of_expert = spec.weights[name][0], "expert" in numbers
                    if tensor != gather.tensor_parallel_size(of_expert) and kind != "replicated":
                        whole = mapping.from_shards(kind, gather.shards(mine, of_expert), spec)
                        mine = mapping.to_shard(kind, whole, spec, tensor, part)
                    parameter.copy_(mine)
                gather.from_stage(parameter, stage)
