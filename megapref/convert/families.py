"""The model families there are, one table entry each: Hugging Face config.json to Core's arguments, and tensor names to parameter names.

Every field of config.json is mapped, or harmless, or must have the value that `transformers` takes when it is absent: a field that would change
the computation in a way this code does not know is a ValueError, never dropped.
"""

from __future__ import annotations

import json
import math
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megapref.batch import ModelSpec

Weights = dict[str, tuple[str, tuple[str, ...]]]

_LAYER, _HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
_EMBEDDING = ("vocab", ("model.embed_tokens.weight",))
_DECODER: Weights = {
    "embedding.word_embeddings.weight": _EMBEDDING,
    _LAYER + "input_layernorm.weight": ("replicated", (_HF_LAYER + "input_layernorm.weight",)),
    _LAYER + "self_attention.linear_qkv.weight": ("qkv", tuple(f"{_HF_LAYER}self_attn.{x}_proj.weight" for x in "qkv")),
    _LAYER + "self_attention.linear_proj.weight": ("row", (_HF_LAYER + "self_attn.o_proj.weight",)),
    _LAYER + "pre_mlp_layernorm.weight": ("replicated", (_HF_LAYER + "post_attention_layernorm.weight",)),
    _LAYER + "mlp.linear_fc1.weight": ("gated", (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight")),
    _LAYER + "mlp.linear_fc2.weight": ("row", (_HF_LAYER + "mlp.down_proj.weight",)),
    "decoder.final_layernorm.weight": ("replicated", ("model.norm.weight",)),
    "output_layer.weight": ("vocab", ("lm_head.weight",)),
}
_QKV_BIAS: Weights = {_LAYER + "self_attention.linear_qkv.bias": ("qkv", tuple(f"{_HF_LAYER}self_attn.{x}_proj.bias" for x in "qkv"))}
_QK_NORM: Weights = {
    f"{_LAYER}self_attention.{x}_layernorm.weight": ("replicated", (f"{_HF_LAYER}self_attn.{x}_norm.weight",)) for x in "qk"
}


@dataclass(frozen=True)
class Family:
    """What tells a family from the plain decoder: RMS norm, rotary positions, grouped queries, gated SiLU MLP, no biases."""

    architecture: str
    options: dict[str, Any] = field(default_factory=dict)  # of Core's TransformerConfig
    weights: Weights = field(default_factory=dict)


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", {"add_qkv_bias": True}, _QKV_BIAS),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_layernorm": True}, _QK_NORM),
}

_MAPPED = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
    ]
)
# Names, token ids, training recipes, outputs, classification heads; the last two say what sliding_window and layer_types say.
_HARMLESS = frozenset(
    [
        "model_type",
        "architectures",
        "_name_or_path",
        "transformers_version",
        "dtype",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "use_cache",
        "initializer_range",
        "pretraining_tp",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "id2label",
        "label2id",
        "problem_type",
        "use_sliding_window",
        "max_window_layers",
    ]
)
_ROPE_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def read_spec(folder: str | Path) -> ModelSpec:
    """The model that a Hugging Face folder's config.json describes. Errors: ValueError naming the field, its value and what is supported."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a Hugging Face checkpoint: it has no config.json")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    try:
        return to_spec(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def to_spec(config: dict[str, Any]) -> ModelSpec:
    """The model that the contents of a config.json describe."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise _unsupported("model_type", model_type, ", ".join(FAMILIES))
    family = FAMILIES[model_type]
    architectures = config.get("architectures") or [family.architecture]
    if family.architecture not in architectures:
        raise _unsupported("architectures", architectures, f"[{family.architecture!r}]")
    values = _complete(config)
    heads, groups = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % groups:
        raise ValueError(f"num_key_value_heads={groups} does not divide num_attention_heads={heads}")
    width = values.get("head_dim") or values["hidden_size"] // heads
    tied = bool(values["tie_word_embeddings"])
    return ModelSpec(
        family=model_type,
        transformer={
            "num_layers": values["num_hidden_layers"],
            "hidden_size": values["hidden_size"],
            "ffn_hidden_size": values["intermediate_size"],
            "num_attention_heads": heads,
            "num_query_groups": groups,
            "kv_channels": width,
            "normalization": "RMSNorm",
            "layernorm_epsilon": values["rms_norm_eps"],
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "add_bias_linear": False,
            **family.options,
        },
        vocab_size=values["vocab_size"],
        max_positions=values["max_position_embeddings"],
        rotary_frequencies=rotary_frequencies(values["rope_parameters"], width),
        tied=tied,
        dtype=values["dtype"] or "float32",
        weights={**_DECODER, **family.weights, **({"output_layer.weight": _EMBEDDING} if tied else {})},
    )


def rotary_frequencies(rope: dict[str, Any], width: int) -> tuple[float, ...]:
    """Radians per position of each pair of dimensions of a head (arXiv:2104.09864), scaled as Llama 3.1 does or linearly (arXiv:2306.15595)."""
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_FIELDS:
        raise _unsupported("rope_parameters.rope_type", kind, ", ".join(_ROPE_FIELDS))
    for name, value in rope.items():
        if name not in _ROPE_FIELDS[kind] | {"rope_type", "type", "rope_theta"} and (name, value) != ("partial_rotary_factor", 1.0):
            raise _unsupported(f"rope_parameters.{name}", value, f"the fields {sorted(_ROPE_FIELDS[kind] | {'rope_theta'})} of {kind!r}")
    if missing := _ROPE_FIELDS[kind] - set(rope):
        raise ValueError(f"rope_parameters of type {kind!r} lack {sorted(missing)}")
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, width, 2).float() / width))
    if kind == "linear":
        frequencies = frequencies / rope["factor"]
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the original context
        unscaled = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - unscaled) * frequencies / rope["factor"] + unscaled * frequencies
    return tuple(frequencies.tolist())


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with the defaults of `transformers` filled in and old spellings made new, checked for what is not supported."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[config["model_type"]]
    try:
        values = cls.from_dict(deepcopy(config)).to_dict()  # it writes into nested fields
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a valid {config['model_type']} configuration: {error}") from error
    defaults = cls().to_dict()
    window = values.pop("sliding_window", None)
    if any(kind != "full_attention" for kind in values.pop("layer_types", None) or ()):
        raise _unsupported("layer_types with sliding_window", window, "full attention in every layer (sliding_window: null)")
    if "layer_types" not in defaults and window is not None and window < values["max_position_embeddings"]:
        raise _unsupported("sliding_window", window, "null, or at least max_position_embeddings")
    for name, value in values.items():
        if name in _MAPPED or name in _HARMLESS:
            continue
        if name not in defaults:
            raise ValueError(
                f"{name}={value!r} is not a known field of {config['model_type']}; remove it if it does not change the computation"
            )
        if value != defaults[name]:
            raise _unsupported(name, value, repr(defaults[name]))
    return values


def _unsupported(name: str, value: Any, supported: str) -> ValueError:
    return ValueError(f"{name}={value!r} is not supported; supported: {supported}")
