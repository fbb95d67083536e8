"""Hugging Face config.json to a ModelSpec, by the table of families.

Every field of config.json is mapped, or harmless, or must have the value that `transformers` takes when it is absent: a field that would change
the computation in a way this code does not know is a ValueError, never dropped.
"""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megapref.batch import ModelSpec
from megapref.convert.table import FAMILIES, Family

SCORES = "score.weight"  # of a classifier, [labels, H]; Core's model has no such parameter

# What is read of every family that has it.
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
        "layer_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
        "sliding_window",
        "layer_types",
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


def read_spec(folder: str | Path, classifier: bool = False) -> ModelSpec:
    """The model that a Hugging Face folder's config.json describes; a sequence classifier only where that is expected.

    Errors: ValueError naming the field, its value and what is supported.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a Hugging Face checkpoint: it has no config.json")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    try:
        return to_spec(config, classifier)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def to_spec(config: dict[str, Any], classifier: bool = False) -> ModelSpec:
    """The model that the contents of a config.json describe. A `classifier` has a matrix of scores in place of the output layer."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise _unsupported("model_type", model_type, ", ".join(FAMILIES))
    family = FAMILIES[model_type]
    architectures = config.get("architectures") or [family.architecture]
    scores = classifier and family.classifier in architectures
    if not scores and family.architecture not in architectures:
        supported = [family.architecture, family.classifier] if classifier else [family.architecture]
        raise _unsupported("architectures", architectures, " or ".join(f"[{name!r}]" for name in supported))
    values = _complete(config)
    heads = values["num_attention_heads"]
    groups = values.get("num_key_value_heads") or heads
    if heads % groups:
        raise ValueError(f"num_key_value_heads={groups} does not divide num_attention_heads={heads}")
    width = values.get("head_dim") or values["hidden_size"] // heads
    tied = bool(values["tie_word_embeddings"]) and not scores
    weights = {**family.weights, **({"output_layer.weight": family.weights["embedding.word_embeddings.weight"]} if tied else {})}
    if scores:
        del weights["output_layer.weight"]
        weights[SCORES] = ("replicated", ("score.weight",))
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
            "layernorm_epsilon": values["rms_norm_eps"] if "rms_norm_eps" in values else values["layer_norm_eps"],
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "add_bias_linear": False,
            **_window(values),
            **family.options,
            **{option: setting for name, of_value in family.fields.items() for option, setting in of_value(values[name]).items()},
        },
        vocab_size=values["vocab_size"],
        max_positions=values["max_position_embeddings"],
        **_rotary(values["rope_parameters"], width, family),
        tied=tied,
        dtype=values["dtype"] or "float32",
        weights=weights,
    )


def _rotary(rope: dict[str, Any], width: int, family: Family) -> dict[str, tuple[float, ...]]:
    """The frequencies of a ModelSpec; config.json may have those of layers with and without a sliding window apart."""
    if family.options.get("two_rotary_bases"):
        local, everywhere = (rotary_frequencies(rope[f"{kind}_attention"], width) for kind in ("sliding", "full"))
        return {"rotary_frequencies": everywhere, "local_rotary_frequencies": local}
    share = rope.get("partial_rotary_factor", 1.0) if family.partial_rotary else 1.0
    others = {name: value for name, value in rope.items() if not (family.partial_rotary and name == "partial_rotary_factor")}
    return {"rotary_frequencies": rotary_frequencies(others, int(width * share))}


def _window(values: dict[str, Any]) -> dict[str, Any]:
    """Core's options of the layers that see the last `sliding_window` tokens only; none where that is as many as there are positions."""
    window, kinds = values.get("sliding_window"), values.get("layer_types") or ["sliding_attention"] * values["num_hidden_layers"]
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise _unsupported("layer_types", sorted(unknown), "full_attention, sliding_attention")
    is_local = [kind == "sliding_attention" for kind in kinds]
    if window is None or window >= values["max_position_embeddings"] or not any(is_local):
        return {}
    return {"window_size": (window - 1, 0), "window_attn_skip_freq": [int(local) for local in is_local]}


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
    family = FAMILIES[config["model_type"]]
    known = _MAPPED | _HARMLESS | family.fields.keys() | ({"partial_rotary_factor"} if family.partial_rotary else set())
    for name, value in values.items():
        # transformers reads head_dim where it is, whether the configuration's class knows it or not.
        if name in known and (name in defaults or name == "head_dim" or name not in _MAPPED):
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
