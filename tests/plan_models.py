"""Models that are published with numbers, as the planner takes them."""

from __future__ import annotations

from megapref.batch import ModelSpec
from megapref.convert.families import to_spec


def llama(hidden: int, ffn: int, layers: int, heads: int) -> ModelSpec:
    """A model of the Llama 3 papers."""
    return to_spec(
        dict(
            model_type="llama",
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            vocab_size=128256,
            max_position_embeddings=131072,
        )
    )


LLAMA3 = {"8B": llama(4096, 14336, 32, 32), "70B": llama(8192, 28672, 80, 64), "405B": llama(16384, 53248, 126, 128)}


def gpt(hidden: int, layers: int, heads: int, vocab: int = 51200, positions: int = 2048) -> ModelSpec:
    """A model of the Megatron papers, less its biases and learned positions: as many heads for keys as for queries, an MLP four times as wide."""
    layer = "decoder.layers.{layer}."
    kinds = {
        "embedding.word_embeddings.weight": "vocab",
        layer + "input_layernorm.weight": "replicated",
        layer + "self_attention.linear_qkv.weight": "qkv",
        layer + "self_attention.linear_proj.weight": "row",
        layer + "pre_mlp_layernorm.weight": "replicated",
        layer + "mlp.linear_fc1.weight": "column",
        layer + "mlp.linear_fc2.weight": "row",
        "decoder.final_layernorm.weight": "replicated",
        "output_layer.weight": "vocab",
    }
    transformer = dict(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=hidden // heads,
        normalization="LayerNorm",
    )
    return ModelSpec("gpt", transformer, vocab, positions, (), True, "bfloat16", {name: (kind, ()) for name, kind in kinds.items()})
