import json

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st

from megapref.convert import mapping
from megapref.convert.families import FAMILIES, read_spec, to_spec

LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.0], "long_factor": [1.0, 1.0]}


def config(name: str, **changes) -> dict:
    return {**tiny_models.CONFIGS[name], **changes}


@pytest.mark.parametrize(
    ("name", "changes", "field", "value"),
    [
        ("llama", {"model_type": "gpt2"}, "model_type", "'gpt2'"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures", "LlamaForSequenceClassification"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type", "'yarn'"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type", "'dynamic'"),
        ("llama", {"rope_parameters": {**tiny_models.LLAMA3_ROPE, "attention_factor": 2.0}}, "rope_parameters.attention_factor", "2.0"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act", "'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias", "True"),
        ("llama", {"mlp_bias": True}, "mlp_bias", "True"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout", "0.1"),
        ("qwen3", {"attention_bias": True}, "attention_bias", "True"),
        ("llama", {"logit_softcap": 30.0}, "logit_softcap", "30.0"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config", "bits"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types", "linear_attention"),
        ("gpt_neox", {"num_key_value_heads": 2}, "num_key_value_heads", "2"),
        ("gpt_neox", {"hidden_act": "silu"}, "hidden_act", "silu"),
        ("phi3", {"rope_parameters": LONG_ROPE}, "rope_type", "longrope"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention", "True"),
        ("gemma3", {"model_type": "gemma3"}, "model_type", "gemma3_text"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers", "[0]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step", "2"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise", "0.1"),
        ("olmo2", {"attention_bias": True}, "attention_bias", "True"),
        ("qwen2", {"num_key_value_heads": 3}, "num_key_value_heads", "3"),
    ],
)
def test_what_is_not_supported_is_named(name, changes, field, value):
    with pytest.raises(ValueError) as error:
        to_spec(config(name, **changes))
    assert field in str(error.value) and value in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": 4096}),  # as far as the positions reach: full attention
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}),
        ("llama", {"torch_dtype": "bfloat16", "_name_or_path": "x", "use_cache": False, "pretraining_tp": 2}),
    ],
)
def test_what_changes_nothing_is_allowed(name, changes):
    spec, plain = to_spec(config(name, **changes)), to_spec(config(name))
    assert spec.transformer == plain.transformer and spec.rotary_frequencies == plain.rotary_frequencies


def test_layers_with_a_sliding_window_are_named_one_by_one():
    assert to_spec(config("mistral_window")).transformer["window_size"] == (19, 0)  # the token itself is not counted
    assert to_spec(config("qwen2_window")).transformer["window_attn_skip_freq"] == [0, 1]
    assert "window_size" not in to_spec(config("qwen2_window", layer_types=["full_attention"] * 2)).transformer


def test_old_spelling_of_rotary_positions_means_the_same():
    scaling = {name: value for name, value in tiny_models.LLAMA3_ROPE.items() if name != "rope_theta"}
    old = config("llama", rope_theta=1e3, rope_scaling=scaling, torch_dtype="bfloat16")
    del old["rope_parameters"]
    assert to_spec(old).rotary_frequencies == to_spec(config("llama")).rotary_frequencies
    assert (to_spec(old).dtype, to_spec(config("llama")).dtype) == ("bfloat16", "float32")


def test_missing_and_broken_config(tmp_path):
    with pytest.raises(ValueError, match="has no config"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"config.json: model_type='bert' is not supported; supported: llama"):
        read_spec(tmp_path)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_weight_table_covers_the_tensors_of_transformers(model_type):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    options = config(next(name for name, options in tiny_models.CONFIGS.items() if options["model_type"] == model_type))
    spec = to_spec(options)
    options.pop("model_type")
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**options))
    theirs = set(tiny_models.on_disk(model, model.state_dict()))
    assert mapping.tensor_names(spec) == theirs - ({"lm_head.weight"} if spec.tied else set())


SPEC = to_spec(config("qwen2", num_attention_heads=8, num_key_value_heads=4, hidden_size=64))
WIDTH = SPEC.transformer["kv_channels"]


@given(kind=st.sampled_from(["replicated", "column", "row", "vocab", "gated", "qkv", "qkv_bias"]), size=st.sampled_from([1, 2, 4]))
def test_shards_are_an_invertible_move(kind, size):
    kind, is_bias = kind.removesuffix("_bias"), kind.endswith("_bias")
    shapes = {"vocab": [(131, 8)], "gated": [(16, 8)] * 2, "qkv": [(8 * WIDTH, 8), (4 * WIDTH, 8), (4 * WIDTH, 8)]}.get(kind, [(16, 8)])
    tensors = [torch.randn(shape[:1] if is_bias else shape) for shape in shapes]
    shards = [mapping.to_shard(kind, tensors, SPEC, size, rank) for rank in range(size)]
    assert len({shard.shape for shard in shards}) == 1
    assert mapping.source_shapes(kind, tuple(shards[0].shape), SPEC, size) == [tuple(tensor.shape) for tensor in tensors]
    back = mapping.from_shards(kind, shards, SPEC)
    assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))


def test_query_groups_stay_together():
    """A fused row block of a group: its two query heads, its key head, its value head."""
    query, key, value = (torch.arange(n * WIDTH).float()[:, None] + base for n, base in ((8, 0), (4, 1000), (4, 2000)))
    fused = mapping.to_shard("qkv", [query, key, value], SPEC, 2, 1)  # groups 2 and 3
    group = fused.view(2, 4, WIDTH)[0, :, 0]
    assert group.tolist() == [4 * WIDTH, 5 * WIDTH, 1000 + 2 * WIDTH, 2000 + 2 * WIDTH]
