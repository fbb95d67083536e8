"""The model families there are, one entry each: which fields config.json may have, Core's options, and where each weight is.

A field of config.json that no entry names has to have the value that `transformers` takes when it is absent, or is harmless (see families.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
_MOE = {"moe_router_load_balancing_type": "none"}


@dataclass(frozen=True)
class Family:
    """A decoder with rotary positions and grouped queries. RMS norms, a gated SiLU MLP and no biases unless `options` say otherwise."""

    architecture: str
    options: dict[str, Any] = field(default_factory=dict)  # of mcore.model.build_model's decoder
    fields: dict[str, Field] = field(default_factory=dict)  # of config.json, besides those that all families have
    weights: Weights = field(default_factory=lambda: _DECODER)


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
}
