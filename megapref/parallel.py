"""How a model, its packs and its sampling are spread over processes, and the numbers that follow from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Literal

Count = Annotated[int, ">= 1"]


@dataclass(frozen=True)
class SamplingParallel:
    # An engine on the training layout's own weights costs no memory. Stages of a pipeline wait for each other with every token, though; a second copy
    # of the weights in tensor-parallel parts decodes without, on all ranks: each takes some of the prompts.
    tensor: Count | None = None  # sample with a copy of the weights on so many ranks each; null: as trained, where the engine can


@dataclass(frozen=True)
class Parallel:
    tensor: Count = 1  # ranks that share every layer
    pipeline: Count = 1  # stages of layers
    virtual_pipeline: Count = 1  # chunks of layers per stage, run in turns (interleaved)
    first_stage_layers: Count | None = None  # layers of the first stage, which also has the embedding; null: as many as the others
    last_stage_layers: Count | None = None  # layers of the last stage, which also has the head; null: as many as the others
    context: Count = 1  # ranks that share every pack, each with some of its rows
    expert: Count = 1  # ranks that share the experts
    expert_tensor: Count | None = None  # ranks that share each expert; null: as many as parallel.tensor; 1: experts are whole
    sequence: bool = False  # norms and dropouts split over the tensor ranks
    tp_comm_overlap: bool = False  # the tensor ranks' messages beside matrix products, with packs of one length (needs Transformer Engine)
    recompute: Literal["none", "selective", "full"] = "none"  # in backward, to save memory: nothing, the attention, or whole layers
    offload_layers: Annotated[int, ">= 0"] = 0  # whose activations are in CPU memory from forward to backward (needs Transformer Engine)

    @property
    def expert_parts(self) -> int:
        """Into how many parts each expert is cut."""
        return self.expert_tensor or self.tensor

    @property
    def pad_multiple(self) -> int:
        """What the rows of a pack are padded to a multiple of: context ranks take two parts each, sequence parallelism splits these again."""
        return (2 * self.context if self.context > 1 else 1) * (self.tensor if self.sequence else 1)

    def stage_layers(self, num_layers: int) -> list[int]:
        """The layers of each pipeline stage. ValueError where a model of so many cannot be cut into them."""
        ends = {name: value for name in ("first_stage_layers", "last_stage_layers") if (value := getattr(self, name)) is not None}
        for name, value in {**ends, "virtual_pipeline": self.virtual_pipeline - 1}.items():
            if self.pipeline == 1 and value:
                raise ValueError(
                    f"parallel.{name}={getattr(self, name)} is about stages of a pipeline, but parallel.pipeline=1; use more stages, or leave it out"
                )
        left, others = num_layers - sum(ends.values()), self.pipeline - len(ends)
        if left < others or (left % others if others else left):
            given = "".join(f" less parallel.{name}={value}" for name, value in ends.items())
            remedy = f"other values: {left} layers are left for {others} equal stages" if ends else divisors(num_layers)
            raise ValueError(f"parallel.pipeline={self.pipeline} does not divide the model's num_hidden_layers={num_layers}{given}; use {remedy}")
        each = left // others if others else 0
        layers = [self.first_stage_layers or each, *[each] * (self.pipeline - 2), self.last_stage_layers or each][-self.pipeline :]
        if wrong := [number for number in layers if number % self.virtual_pipeline]:
            raise ValueError(
                f"parallel.virtual_pipeline={self.virtual_pipeline} does not divide the {wrong[0]} layers of a stage; use {divisors(wrong[0])}"
            )
        return layers

    @property
    def pack_multiple(self) -> int:
        """What a rank's packs are a multiple of: virtual stages are run on groups of as many packs as there are stages."""
        return self.pipeline if self.virtual_pipeline > 1 else 1

    def sampling_tensor(self, sampling: SamplingParallel) -> int | None:
        """How many ranks share a copy of the weights that is there for sampling; None: the engine runs on the weights that are trained."""
        if sampling.tensor is None and max(self.virtual_pipeline, self.context, self.expert) > 1:
            return self.tensor
        return sampling.tensor


def one_process() -> list[str]:
    """Returns the overrides that lay a run out on one process, whatever its recipe says."""
    return [f"parallel.{name}={json.dumps(value)}" for name, value in vars(Parallel()).items()] + ["generation.parallel.tensor=null"]


def divisors(n: int) -> str:
    """Returns what divides `n`, as a message lists it."""
    found = [str(d) for d in range(1, n + 1) if n % d == 0]
    return f"{', '.join(found[:-1])} or {found[-1]}" if n > 1 else "1"
