"""The model families there are, one entry each: which fields config.json may have, Core's options, and where each weight is.

A field of config.json that no entry names has to have the value that `transformers` takes when it is absent, or is harmless (see families.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.nn.functional as F

Weights = dict[str, tuple[str, tuple[str, ...]]]
Field = Callable[[Any], dict[str, Any]]  # a field's value to the options it sets

_LAYER, _HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
_DECODER: Weights = {
    "embedding.word_embeddings.weight": ("vocab", ("model.embed_tokens.weight",)),
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


def _experts(router: str, gate: str, up: str, down: str) -> Weights:
    """The plain decoder with experts in place of its MLP: the router, and the names of an expert's matrices, all below a layer."""
    dense = {name: entry for name, entry in _DECODER.items() if ".mlp." not in name}
    expert = _LAYER + "mlp.experts.local_experts.{expert}."
    return {
        **dense,
        _LAYER + "mlp.router.weight": ("replicated", (_HF_LAYER + router,)),
        expert + "linear_fc1.weight": ("gated", (_HF_LAYER + gate, _HF_LAYER + up)),
        expert + "linear_fc2.weight": ("row", (_HF_LAYER + down,)),
    }


_MIXTRAL = _experts("block_sparse_moe.gate.weight", *(f"block_sparse_moe.experts.{{expert}}.{x}.weight" for x in ("w1", "w3", "w2")))
_QWEN_MOE = _experts("mlp.gate.weight", *(f"mlp.experts.{{expert}}.{x}_proj.weight" for x in ("gate", "up", "down")))
# Losses that only shape the router in pretraining, and what transformers returns.
_ROUTER_TRAINING: dict[str, Field] = {name: lambda value: {} for name in ("router_aux_loss_coef", "output_router_logits")}
_ROUTER: dict[str, Field] = {
    "num_local_experts": lambda value: {"num_moe_experts": value},
    "num_experts_per_tok": lambda value: {"moe_router_topk": value},
    **_ROUTER_TRAINING,
}

_GELU_TANH = partial(F.gelu, approximate="tanh")
_GEMMA_OPTIONS = {"layernorm_zero_centered_gamma": True, "activation_func": _GELU_TANH}
_SCALED_EMBEDDING: dict[str, Field] = {"hidden_size": lambda value: {"embedding_scale": value**0.5}}
_GEMMA2_FIELDS: dict[str, Field] = {
    **_SCALED_EMBEDDING,
    "query_pre_attn_scalar": lambda value: {"softmax_scale": value**-0.5},
    "attn_logit_softcapping": lambda value: {"attention_softcap": value},
    "final_logit_softcapping": lambda value: {"logit_softcap": value},
}
_POST_NORMS: Weights = {
    _LAYER + "self_attention.post_norm.weight": ("replicated", (_HF_LAYER + "post_attention_layernorm.weight",)),
    _LAYER + "mlp.post_norm.weight": ("replicated", (_HF_LAYER + "post_feedforward_layernorm.weight",)),
}
_GEMMA2: Weights = {
    **_DECODER,
    **_POST_NORMS,
    _LAYER + "pre_mlp_layernorm.weight": ("replicated", (_HF_LAYER + "pre_feedforward_layernorm.weight",)),
}
_OLMO2: Weights = {
    **{name: entry for name, entry in _DECODER.items() if not name.startswith(_LAYER) or "layernorm" not in name},
    **_POST_NORMS,
    **{name: ("column", tensors) for name, (_, tensors) in _QK_NORM.items()},
}
_PHI3: Weights = {
    **_DECODER,
    _LAYER + "self_attention.linear_qkv.weight": ("qkv", (_HF_LAYER + "self_attn.qkv_proj.weight",)),
    _LAYER + "mlp.linear_fc1.weight": ("gated", (_HF_LAYER + "mlp.gate_up_proj.weight",)),
}
_NEOX_ACTIVATIONS = {"gelu": F.gelu, "gelu_new": _GELU_TANH, "gelu_fast": _GELU_TANH, "gelu_pytorch_tanh": _GELU_TANH, "relu": F.relu}


def _gpt_neox() -> Weights:
    """Its tensors have no common names with those of the others; the fused one is in Core's order already."""
    layer = "gpt_neox.layers.{layer}."
    modules = {
        _LAYER + "input_layernorm": ("replicated", layer + "input_layernorm"),
        _LAYER + "self_attention.linear_qkv": ("column", layer + "attention.query_key_value"),
        _LAYER + "self_attention.linear_proj": ("row", layer + "attention.dense"),
        _LAYER + "pre_mlp_layernorm": ("replicated", layer + "post_attention_layernorm"),
        _LAYER + "mlp.linear_fc1": ("column", layer + "mlp.dense_h_to_4h"),
        _LAYER + "mlp.linear_fc2": ("row", layer + "mlp.dense_4h_to_h"),
        "decoder.final_layernorm": ("replicated", "gpt_neox.final_layer_norm"),
    }
    weights: Weights = {"embedding.word_embeddings.weight": ("vocab", ("gpt_neox.embed_in.weight",))}
    for name, (kind, theirs) in modules.items():
        weights[name + ".weight"] = (kind, (theirs + ".weight",))
        weights[name + ".bias"] = ("replicated" if kind == "row" else kind, (theirs + ".bias",))  # of rows, the sum gets the bias
    return {**weights, "output_layer.weight": ("vocab", ("embed_out.weight",))}


def _one_of(name: str, choices: dict[str, Any], option: str) -> Field:
    """A field that names one of these choices."""

    def options(value: Any) -> dict[str, Any]:
        if value not in choices:
            raise ValueError(f"{name}={value!r} is not supported; supported: {', '.join(choices)}")
        return {option: choices[value]}

    return options


_MOE = {"moe_router_load_balancing_type": "none"}


@dataclass(frozen=True)
class Family:
    """A decoder with rotary positions and grouped queries. RMS norms, a gated SiLU MLP and no biases unless `options` say otherwise."""

    architecture: str
    options: dict[str, Any] = field(default_factory=dict)  # of mcore.model.build_model's decoder
    fields: dict[str, Field] = field(default_factory=dict)  # of config.json, besides those that all families have
    weights: Weights = field(default_factory=lambda: _DECODER)
    partial_rotary: bool = False  # it may turn the first dimensions of a head only

    @property
    def classifier(self) -> str:
        """The architecture of its sequence classifiers."""
        return self.architecture.replace("ForCausalLM", "ForSequenceClassification")


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "mixtral": Family("MixtralForCausalLM", _MOE, _ROUTER, _MIXTRAL),
    "qwen2": Family("Qwen2ForCausalLM", {"add_qkv_bias": True}, weights={**_DECODER, **_QKV_BIAS}),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_layernorm": True}, weights={**_DECODER, **_QK_NORM}),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {"qk_layernorm": True, **_MOE},
        {
            **_ROUTER,
            "moe_intermediate_size": lambda value: {"moe_ffn_hidden_size": value},
            "norm_topk_prob": lambda value: {"moe_router_pre_softmax": not value},
        },
        {**_QWEN_MOE, **_QK_NORM},
    ),
    "gemma": Family("GemmaForCausalLM", _GEMMA_OPTIONS, _SCALED_EMBEDDING),
    "gemma2": Family("Gemma2ForCausalLM", {"post_norms": True, **_GEMMA_OPTIONS}, _GEMMA2_FIELDS, _GEMMA2),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {"post_norms": True, "two_rotary_bases": True, "qk_layernorm": True, **_GEMMA_OPTIONS},
        {**_GEMMA2_FIELDS, "_sliding_window_pattern": lambda value: {}},  # layer_types says it
        {**_GEMMA2, **_QK_NORM},
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        {"normalization": "LayerNorm", "gated_linear_unit": False, "add_bias_linear": True},
        {
            "use_parallel_residual": lambda value: {"parallel_residual": value},
            "hidden_act": _one_of("hidden_act", _NEOX_ACTIVATIONS, "activation_func"),
            "classifier_dropout": lambda value: {},
        },
        _gpt_neox(),
        partial_rotary=True,
    ),
    "phi3": Family("Phi3ForCausalLM", fields={"original_max_position_embeddings": lambda value: {}}, weights=_PHI3, partial_rotary=True),
    "olmo2": Family(
        "Olmo2ForCausalLM", {"pre_norms": False, "post_norms": True, "projection_qk_norm": True}, weights=_OLMO2
    ),
}
