"""Which kernels compute a model: a pure function of the model, the options and the machine, with the reason for every choice.

Optional libraries are looked for here alone, and only where a GPU is: without one, importing them can break Core itself.
"""

from __future__ import annotations

import importlib
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from packaging.version import Version

from megapref.config import Config, Kernels, Precision
from megapref.precision import group_of

# Optional libraries: name, distribution, module that has to work.
OPTIONAL = (
    ("Transformer Engine", "transformer-engine", "transformer_engine.pytorch"),
    ("apex", "apex", "fused_weight_gradient_mlp_cuda"),  # of its compiled kernels, which PyPI's unrelated apex has not
    ("flash-attn", "flash-attn", "flash_attn"),
    ("flash-attn 3", "flash-attn-3", "flash_attn_3"),
    ("flash-attn 4", "flash-attn-4", "flash_attn.cute"),
)
_WORKS = re.compile(r"\d[\w.+-]*$")
# Of each recipe: the least and the first no longer supported compute capability, and the least CUDA (Transformer Engine 2.20).
_RECIPES = {
    "delayed": ((8, 9), None, (12, 1)),
    "current": ((8, 9), None, (12, 1)),
    "blockwise": ((9, 0), None, (12, 9)),
    "mxfp8": ((10, 0), (12, 0), (12, 8)),
}
_LEAST_FLASH_ATTN = "2.7.3"  # of version 2, as Core asks
# cuDNN's widest head in training that Transformer Engine takes on every GPU from Ampere on.
_WIDEST_HEAD = 128


@dataclass(frozen=True)
class Machine:
    """What the choice depends on: the GPU's compute capability (None: no GPU), torch's CUDA, and of each optional library a version or why not."""

    capability: tuple[int, int] | None
    cuda: tuple[int, int] | None
    libraries: dict[str, str] = field(default_factory=dict)

    def lacks(self, library: str) -> str | None:
        """Why the library cannot be used, None where it can."""
        state = self.libraries.get(library, "not installed")
        if self.capability is None:
            return "there is no GPU"
        return None if _WORKS.match(state) else f"{library} {state}"


@dataclass(frozen=True)
class Choice:
    """What computes a model. `why` has, by the name of an operation, the reason where the faster one of several is not used."""

    te_layers: bool
    te_attention: bool
    fused_rope: bool
    fused_activation: bool
    fused_bias_dropout: bool
    fused_gradients: bool
    why: dict[str, str]


@cache
def machine() -> Machine:
    """This process's."""
    has_gpu = torch.cuda.is_available()
    return Machine(
        torch.cuda.get_device_capability() if has_gpu else None,
        tuple(int(part) for part in torch.version.cuda.split(".")[:2]) if torch.version.cuda else None,
        {name: library_state(distribution, module, has_gpu) for name, distribution, module in OPTIONAL},
    )


def library_state(distribution: str, module: str, has_gpu: bool) -> str:
    """A version, or why the library is not used. It is imported only where a GPU is."""
    try:
        installed = version(distribution)
    except PackageNotFoundError:
        return "not installed"
    if not has_gpu:
        return f"{installed} is installed and not imported: there is no GPU"
    try:
        importlib.import_module(module)
    except Exception as error:  # compiled extensions fail in many ways; whatever it is goes into the report
        return f"{installed} does not work: {type(error).__name__}: {error}"
    return installed


def check_machine(cfg: Config, found: Machine) -> None:
    """Raises ValueError where this machine cannot compute what the config asks for; says what is missing and what to use instead."""
    _check_options(cfg.precision, cfg.kernels, found)
    if cfg.optimizer.offload and found.capability is None:
        raise ValueError(f"optimizer.offload={cfg.optimizer.offload:g} moves state from a GPU to CPU memory: there is no GPU; use 0")
    if cfg.kernels.decoding_graphs and found.capability is None:
        raise ValueError(f"kernels.decoding_graphs={cfg.kernels.decoding_graphs} captures a GPU's work: there is no GPU; use 0")
    if cfg.parallel.tp_comm_overlap and (missing := found.lacks("Transformer Engine")):
        raise ValueError(f"parallel.tp_comm_overlap=true needs Transformer Engine's userbuffers: {missing}; use false")
    is_online = cfg.method.pairs == "online" and cfg.run.action == "train"
    if is_online and (missing := no_decoding_attention(found, cfg.precision.dtype)):
        raise ValueError(f"method.pairs=online: {missing}, or use method.pairs=offline")


def _check_options(precision: Precision, kernels: Kernels, found: Machine) -> None:
    if precision.fp8 and (missing := _missing_for_fp8(precision.fp8, found)):
        raise ValueError(f"precision.fp8={precision.fp8} cannot run here: {missing}; use {_instead(precision.fp8, found)}")
    missing = found.lacks("Transformer Engine")
    if precision.moments != "fp32" and missing:
        raise ValueError(f"precision.moments={precision.moments} needs Transformer Engine's Adam: {missing}; use precision.moments=fp32")
    for name in ("layers", "attention"):
        if getattr(kernels, name) == "te" and missing:
            raise ValueError(f"kernels.{name}=te needs Transformer Engine: {missing}; use kernels.{name}=auto or torch")


def no_decoding_attention(found: Machine, dtype: str = "bf16") -> str | None:
    """Why Core's engine cannot decode on this GPU, and what would do; None where it can, or there is no GPU."""
    if found.capability and dtype == "fp32":
        return "generation on a GPU is by FlashAttention, which has no precision.dtype=fp32; use precision=bf16"
    states = {name: found.libraries.get(name, "not installed") for name, *_ in OPTIONAL if name.startswith("flash-attn")}
    if found.capability is None or any(_WORKS.match(state) for name, state in states.items() if name != "flash-attn"):
        return None
    if _WORKS.match(states["flash-attn"]) and Version(states["flash-attn"]) >= Version(_LEAST_FLASH_ATTN):
        return None
    have = ", ".join(f"{name} {state}" for name, state in states.items())
    best = "flash-attn-4, or flash-attn-3" if found.capability >= (9, 0) else "flash-attn"
    return f"generation needs FlashAttention on a GPU ({have}); install {best} (or flash-attn {_LEAST_FLASH_ATTN} or newer)"


def _missing_for_fp8(recipe: str, found: Machine) -> str | None:
    if missing := found.lacks("Transformer Engine"):
        return missing
    least, too_new, cuda = _RECIPES[recipe]
    has, shown = found.capability, ".".join(map(str, found.capability))
    if has < least:
        return f"the GPU has compute capability {shown}, the recipe needs {'.'.join(map(str, least))} or newer"
    if too_new and has >= too_new:
        return f"the GPU has compute capability {shown}, on which Transformer Engine does not support the recipe yet"
    if found.cuda is None or found.cuda < cuda:
        return f"torch was built for CUDA {'.'.join(map(str, found.cuda or ()))}, the recipe needs {'.'.join(map(str, cuda))} or newer"
    return None


def _instead(recipe: str, found: Machine) -> str:
    able = [f"precision={group_of(other)}" for other in _RECIPES if other != recipe and _missing_for_fp8(other, found) is None]
    return " or ".join([*able[:2], "precision=bf16"]) + ("" if found.capability else " (fp32 where results are compared)")


def choose(sizes: dict[str, Any], tensor: int, precision: Precision, kernels: Kernels, found: Machine) -> Choice:
    """What computes a model with these `sizes` (ModelSpec.transformer), in `tensor` parts, here.

    ValueError, saying what to use instead, where the options ask for what the machine or the model does not allow.
    """
    _check_options(precision, kernels, found)
    _check_widths(sizes, precision, tensor)
    why: dict[str, str] = {}
    te_missing = found.lacks("Transformer Engine")
    is_te_layers = _wanted("layers", kernels.layers, te_missing or _not_by_te_layers(precision), why)
    if precision.fp8 and not is_te_layers:
        raise ValueError(f"precision.fp8={precision.fp8} needs kernels.layers=te, not {kernels.layers}; use kernels.layers=auto")
    is_te_attention = _wanted("attention", kernels.attention, te_missing or _not_by_te_attention(sizes, precision), why)
    no_rope = te_missing or ("the model has two rotary bases" if sizes.get("two_rotary_bases") else None)
    activation = "there is no GPU" if found.capability is None else _not_fused(sizes)
    gradients = None if is_te_layers else found.lacks("apex")
    why |= {name: reason for name, reason in (("rope", no_rope), ("activation", activation), ("gradient accumulation", gradients)) if reason}
    return Choice(
        te_layers=is_te_layers,
        te_attention=is_te_attention,
        fused_rope=no_rope is None,
        fused_activation=activation is None,
        fused_bias_dropout=found.capability is not None,
        fused_gradients=gradients is None,
        why=why,
    )


def _check_widths(sizes: dict[str, Any], precision: Precision, tensor: int) -> None:
    """FP8 matrix products need both widths of a rank's part of every weight to be multiples of 16."""
    head = sizes.get("kv_channels") or sizes["hidden_size"] // sizes["num_attention_heads"]
    widths = {
        "hidden size": sizes["hidden_size"],
        "heads": head * sizes["num_attention_heads"] // tensor,
        "MLP": sizes.get("moe_ffn_hidden_size") or sizes["ffn_hidden_size"] // tensor,
    }
    if precision.fp8 and (wrong := [f"{name}: {width}" for name, width in widths.items() if width % 16]):
        raise ValueError(
            f"precision.fp8={precision.fp8} needs widths that are multiples of 16, the model's parts have {', '.join(wrong)} "
            f"(parallel.tensor={tensor}); use a smaller parallel.tensor, or precision=bf16"
        )


def _wanted(name: str, option: str, reason: str | None, why: dict[str, str]) -> bool:
    """Whether Transformer Engine's kernel is used where `reason`, if any, speaks against it."""
    if option == "te" and reason:
        raise ValueError(f"kernels.{name}=te does not fit: {reason}; use kernels.{name}=auto or torch")
    if reason or option == "torch":
        why[name] = reason or f"kernels.{name}=torch"
    return option != "torch" and reason is None


def _not_by_te_layers(precision: Precision) -> str | None:
    return "precision.dtype=fp32 is for comparing, in plain torch" if precision.dtype == "fp32" else None


def _not_by_te_attention(sizes: dict[str, Any], precision: Precision) -> str | None:
    width = sizes.get("kv_channels") or sizes["hidden_size"] // sizes["num_attention_heads"]
    if precision.dtype == "fp32":
        return "cuDNN's fused attention has no fp32"
    if sizes.get("attention_softcap") is not None:
        return "the model's attention scores are soft-capped"
    if width > _WIDEST_HEAD or width % 8:
        return f"the model's heads are {width} wide; cuDNN takes multiples of 8 up to {_WIDEST_HEAD}"
    return None


def _not_fused(sizes: dict[str, Any]) -> str | None:
    """Why Core's fused bias and activation does not know the model's."""
    if sizes.get("activation_func") is F.silu and sizes.get("gated_linear_unit"):
        return None
    return "only SwiGLU: Core's fused GELU is its approximation by tanh, whatever the model has"


def without_fp8(weights: bool = False) -> AbstractContextManager:
    """Inside, matrix products are in bf16, or, with `weights`, new weights are; without Transformer Engine they are anyway."""
    if machine().lacks("Transformer Engine"):
        return nullcontext()
    import transformer_engine.pytorch as te

    return te.fp8_model_init(enabled=False) if weights else te.fp8_autocast(enabled=False)
