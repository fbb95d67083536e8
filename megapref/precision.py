"""What a run computes in, and with which kernels: the options and what can be said of them without looking at the machine.

`mcore/kernels.py` looks at the machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megapref.parallel import Count

Whole = Annotated[int, ">= 0"]

# Rows of a matrix product that each recipe of Transformer Engine (2.x) needs a multiple of.
_ROWS = {None: 1, "delayed": 16, "current": 16, "blockwise": 128, "mxfp8": 32}


@dataclass(frozen=True)
class Audit:
    """Scores some pairs once more, one precision higher, to see what the run's own precision does to them."""

    every: Whole = 0  # steps between audits; 0: never
    pairs: Count = 16  # of a step: its first ones
    max_sign_flips: Annotated[float, ">= 0", "<= 1"] = 0.05  # share of pairs whose margin changes its sign, above which the log warns
    max_kl: Annotated[float, "> 0"] = 0.01  # nats per completion token between the two, above which the log warns


@dataclass(frozen=True)
class Precision:
    dtype: Literal["fp32", "bf16"] = "fp32"  # of weights and activations; losses and optimizer are fp32
    fp8: Literal["delayed", "current", "blockwise", "mxfp8"] | None = None  # Transformer Engine's recipe for the layers' matrix products; null: dtype
    fp8_weights: bool = False  # the policy's weights are kept and gathered in FP8, beside the optimizer's fp32
    amax_history: Count = 1024  # forward passes whose largest values the delayed recipe scales by
    bf16_first_layers: Whole = 0  # that stay in bf16
    bf16_last_layers: Whole = 0  # that stay in bf16; the head always does
    bf16_layers: list[Whole] = field(default_factory=list)  # further ones, by number from 0, such as those an audit finds bad
    gradients: Literal["fp32", "bf16"] = "fp32"  # that are summed over packs and ranks
    moments: Literal["fp32", "bf16", "fp8"] = "fp32"  # Adam's; other than fp32 needs Transformer Engine's Adam
    audit: Audit = field(default_factory=Audit)

    @property
    def name(self) -> str:
        """The group of options that it is, as files and tables call it."""
        return group_of(self.fp8) if self.fp8 else self.dtype

    @property
    def pad_multiple(self) -> int:
        """What the rows of a matrix product are padded to a multiple of."""
        return _ROWS[self.fp8]

    @property
    def keeps_layers(self) -> bool:
        """Whether some layers stay in bf16 under `fp8`."""
        return bool(self.bf16_first_layers or self.bf16_last_layers or self.bf16_layers)

    @property
    def same_rounding(self) -> bool:
        """Whether two models with the same weights give the same numbers for the same packs, whatever each has seen before."""
        return self.fp8 != "delayed"

    def kept_layers(self, num_layers: int) -> frozenset[int]:
        """The layers, from 0, that stay in bf16 under `fp8`."""
        last = range(num_layers - self.bf16_last_layers, num_layers)
        return frozenset({*range(self.bf16_first_layers), *last, *self.bf16_layers}) if self.fp8 else frozenset()


def group_of(recipe: str) -> str:
    """The group of options (`precision=NAME`) with an FP8 recipe."""
    return recipe if recipe == "mxfp8" else f"fp8_{recipe}"


@dataclass(frozen=True)
class Kernels:
    # auto: Transformer Engine's where it works on this machine and knows the model, torch's elsewhere; environment.json says which, and why
    layers: Literal["auto", "torch", "te"] = "auto"  # linear layers, norms before them and experts: torch's, Transformer Engine's (te), or auto
    attention: Literal["auto", "torch", "te"] = "auto"  # of training: torch's, Transformer Engine's (te), or auto
    decoding_graphs: Whole = 0  # so many sizes of batches have their decoding captured as graphs of a GPU; 0: none
