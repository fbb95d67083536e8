"""Tiny Hugging Face checkpoints with random weights, norms and biases included: nothing is one or zero that could hide a mistake."""

from __future__ import annotations

from pathlib import Path

import torch

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e3,  # puts frequencies below, between and above the two factors
    "factor": 4.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 64,
}
SHAPE = dict(
    vocab_size=131,  # odd: padded for tensor parallelism
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=None,  # its row would get no gradient
)
_ONE_KEY_A_HEAD = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
CONFIGS = {
    "llama": dict(model_type="llama", head_dim=16, rope_parameters=LLAMA3_ROPE, rms_norm_eps=1e-5, **SHAPE),
    "llama_tied": dict(model_type="llama", tie_word_embeddings=True, head_dim=16, **SHAPE),
    "mistral": dict(
        model_type="mistral", sliding_window=None, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, **SHAPE
    ),
    "mistral_window": dict(model_type="mistral", sliding_window=20, head_dim=16, **SHAPE),
    "qwen2": dict(model_type="qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **SHAPE),
    "qwen2_tied": dict(model_type="qwen2", tie_word_embeddings=True, **SHAPE),
    "qwen2_window": dict(model_type="qwen2", use_sliding_window=True, sliding_window=33, max_window_layers=1, **SHAPE),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=40, **SHAPE),
    "qwen3_moe": dict(
        model_type="qwen3_moe", head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True, **SHAPE
    ),
    "qwen3_moe_unnormalised": dict(
        model_type="qwen3_moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=False, **SHAPE
    ),
    "gemma": dict(model_type="gemma", head_dim=16, **SHAPE),
    "gemma2": dict(
        model_type="gemma2",
        head_dim=16,
        sliding_window=24,
        query_pre_attn_scalar=11,
        attn_logit_softcapping=3.0,  # low, so that it bends what random weights make
        final_logit_softcapping=2.0,
        **SHAPE,
    ),
    "gemma3": dict(
        model_type="gemma3_text",
        head_dim=16,
        sliding_window=24,
        query_pre_attn_scalar=11,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
        },
        **SHAPE,
    ),
    "gpt_neox": dict(model_type="gpt_neox", use_parallel_residual=True, **_ONE_KEY_A_HEAD),
    "gpt_neox_sequential": dict(model_type="gpt_neox", use_parallel_residual=False, hidden_act="gelu_new", rotary_pct=0.5, **_ONE_KEY_A_HEAD),
    "phi3": dict(model_type="phi3", sliding_window=50, partial_rotary_factor=0.5, **SHAPE),
    "olmo2": dict(model_type="olmo2", **SHAPE),
    "qwen3": dict(model_type="qwen3", head_dim=16, tie_word_embeddings=True, **SHAPE),
}


def on_disk(model, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A transformers model's tensors as its checkpoints have them: experts one by one."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)


def make_checkpoint(
    folder: Path, name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", scores: bool = False, **changes
) -> Path:
    """Saves the named model, with `changes` to its configuration, in `folder` and returns it; one that `scores` is a sequence classifier."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

    options = {**CONFIGS[name], **changes}
    model = (AutoModelForSequenceClassification if scores else AutoModelForCausalLM).from_config(CONFIG_MAPPING[options.pop("model_type")](**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in parameter_name else 0.0
            parameter.copy_(offset + 0.2 * torch.randn(parameter.shape, generator=generator))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
