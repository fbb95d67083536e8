"""Core's layer with what some families have and Core has no option for."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules, get_transformer_layer_offset
from megatron.core.transformer.utils import is_layer_window_attention
from megatron.core.utils import get_pg_rank
from torch import Tensor
from torch.distributed import ProcessGroup

from megapref.mcore import paged_attention
from megapref.mcore.attention import SegmentAttention
from megapref.mcore.kernels import without_fp8
from megapref.mcore.norm import Norm, ProjectionNorm
from megapref.mcore.router import Router
from megapref.mcore.segments import SegmentParams

# Norms of their own, and how they are called in Transformer Engine's linear layers, which have the norm before them in them. Distributed checkpoints
# have the latter names for both.
NORMS_IN_LINEAR = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_", "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


@dataclass
class DecoderConfig(TransformerConfig):
    """Core's TransformerConfig and more; ModelSpec.transformer has its arguments.

    A softcap c makes a score s into c * tanh(s / c).
    """

    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float | None = None
    pre_norms: bool = True  # of what goes into attention and MLP
    post_norms: bool = False  # of what comes out of them, before it is added to the residual
    parallel_residual: bool = False  # the MLP gets what the attention gets
    projection_qk_norm: bool = False  # norms of queries and keys over all heads together
    two_rotary_bases: bool = False  # of the angles that layers get, the last half is for those with a sliding window

    # What computes the model: see kernels.Choice and config.Precision.
    te_layers: bool = False
    te_attention: bool = False
    kept_in_bf16: frozenset[int] = frozenset()  # layers, from 0, whose matrix products are not in FP8
    pad_multiple: int = 1  # of the rows of a matrix product
    decoding_graphs: int = 0

    def __post_init__(self):
        if self.projection_qk_norm:
            self.qk_l2_norm = True  # opens Core's place for such norms; `qk_layernorm` would add up gradients of different shards
        super().__post_init__()


class Attention(SelfAttention):
    """Core's self-attention with post-norm, two rotary bases, and soft-capped scores in generation (SegmentAttention has those of training)."""

    def __init__(self, config: DecoderConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.softmax_scale = config.softmax_scale  # Core (0.19) looks here in generation, in the config in training
        self.is_local = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number)
        self.post_norm = Norm(config, config.hidden_size, config.layernorm_epsilon) if config.post_norms else None

    def forward(self, hidden_states, *args, rotary_pos_emb=None, **kwargs):
        if self.config.two_rotary_bases:
            rotary_pos_emb = rotary_pos_emb.chunk(2, -1)[int(self.is_local)]
        output, bias = super().forward(hidden_states, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        return _normed(self.post_norm, output, bias)

    def flash_decode_and_prefill(
        self, q, k, v, max_q, max_k, starts_q, starts_k, lengths_k, block_table, is_decode_only, softmax_offset=None
    ) -> Tensor:
        """Attention [tokens, 1, N, D] on the paged cache; soft-capped in torch, on a GPU too, as Core passes no softcap to its kernels."""
        if self.config.attention_softcap is None:
            return super().flash_decode_and_prefill(
                q, k, v, max_q, max_k, starts_q, starts_k, lengths_k, block_table, is_decode_only, softmax_offset
            )
        window = self.config.window_size if self.is_local else (-1, -1)
        options = dict(softmax_scale=self.softmax_scale, window_size=window, block_table=block_table, softcap=self.config.attention_softcap)
        if is_decode_only:
            rows = q.reshape(len(lengths_k), -1, *q.shape[2:])
            return paged_attention.flash_attn_with_kvcache(rows, k, v, lengths_k, **options).reshape(q.shape)
        return paged_attention.flash_attn_varlen_func(q[:, 0], k, v, starts_q, starts_k, max_q, max_k, **options)[:, None]


class PostNormMLP(MLP):
    """Core's MLP, its output normalised."""

    def __init__(self, config: DecoderConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.post_norm = Norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, hidden_states, *args, **kwargs):
        return _normed(self.post_norm, *super().forward(hidden_states, *args, **kwargs))


def _normed(norm: Norm | None, output: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if norm is None:
        return output, bias
    return norm(output if bias is None else output + bias), None


class Layer(TransformerLayer):
    """Core's layer with a parallel residual, x + attention(norm(x)) + MLP(norm(x)), where the config says so, and without FP8 where it says so.

    Its router, where it has one, is told which tokens are trained.
    """

    def __init__(self, config: DecoderConfig, submodules, layer_number: int = 1, **kwargs):
        groups, stage = kwargs.get("pg_collection"), kwargs.get("vp_stage")
        number = layer_number - 1 + get_transformer_layer_offset(config, stage, groups and get_pg_rank(groups.pp))
        self.kept_in_bf16 = number in config.kept_in_bf16
        with without_fp8(weights=True) if self.kept_in_bf16 else nullcontext():
            super().__init__(config, submodules, layer_number, **kwargs)

    def forward(self, hidden_states, *args, **kwargs):
        with without_fp8() if self.kept_in_bf16 and self.config.fp8 else nullcontext():
            return self._forward(hidden_states, *args, **kwargs)

    def _forward(self, hidden_states, *args, packed_seq_params=None, inference_context=None, padding_mask=None, **kwargs):
        attended, context = self._forward_attention(
            hidden_states,
            *args,
            packed_seq_params=packed_seq_params,
            inference_context=inference_context,
            padding_mask=padding_mask,
            **kwargs,
        )
        inputs = (hidden_states, attended) if self.config.parallel_residual else attended
        return self._forward_mlp(inputs, inference_context, padding_mask=padding_mask, packed_seq_params=packed_seq_params), context

    def _forward_mlp(self, hidden_states, *args, packed_seq_params=None, **kwargs):
        if self.config.num_moe_experts is not None:
            self.mlp.router.trained = packed_seq_params.trained if isinstance(packed_seq_params, SegmentParams) else None
        return super()._forward_mlp(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)

    def _forward_pre_mlp_layernorm(self, hidden_states):
        """What the MLP gets; with a parallel residual also what its output is added to."""
        if self.config.parallel_residual:
            hidden_states, residual = hidden_states
            return super()._forward_pre_mlp_layernorm(hidden_states), residual
        return super()._forward_pre_mlp_layernorm(hidden_states)


class LastLayer(Layer):
    """The model's last layer: of a pack, only the rows that predict a completion token go through its MLP; nothing uses the others."""

    def _forward_mlp(self, hidden_states, *args, packed_seq_params=None, **kwargs):
        if isinstance(packed_seq_params, SegmentParams) and (rows := packed_seq_params.output_rows) is not None:
            is_parallel = self.config.parallel_residual
            hidden_states = tuple(x.index_select(0, rows) for x in hidden_states) if is_parallel else hidden_states.index_select(0, rows)
            if packed_seq_params.trained is not None:
                packed_seq_params = replace(packed_seq_params, trained=packed_seq_params.trained.at(rows))
        return super()._forward_mlp(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)


def customise(layer: ModuleSpec, config: DecoderConfig, tensor_group: ProcessGroup) -> None:
    """Puts this package's norms, attention and layer into Core's specification of a layer, split over the ranks of `tensor_group`."""
    parts = layer.submodules
    layer.module = Layer
    parts.sharded_state_dict_keys_map = NORMS_IN_LINEAR
    if config.te_layers:
        _customise_te(parts, config)
    else:
        parts.input_layernorm = parts.pre_mlp_layernorm = Norm if config.pre_norms else IdentityOp
    parts.self_attention.module = Attention
    attention = parts.self_attention.submodules
    attention.core_attention = SegmentAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    if config.projection_qk_norm:
        attention.q_layernorm = partial(ProjectionNorm, num_heads=config.num_attention_heads, group=tensor_group)
        attention.k_layernorm = partial(ProjectionNorm, num_heads=config.num_query_groups, group=tensor_group)
    if config.num_moe_experts is not None:
        parts.mlp = partial(parts.mlp.func, submodules=replace(parts.mlp.keywords["submodules"], router=Router))
    if config.post_norms:
        assert config.num_moe_experts is None, "no family has experts and post-norms"
        parts.mlp = partial(PostNormMLP.as_mlp_submodule, **parts.mlp.keywords)


def _customise_te(parts: TransformerLayerSubmodules, config: DecoderConfig) -> None:
    """Transformer Engine's linear layers have the norm before them in them, but for experts, which several come after one norm."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    if config.num_moe_experts:
        parts.pre_mlp_layernorm = Norm
    if not config.pre_norms:
        assert config.num_moe_experts is None, "no family has experts and no norms before them"
        parts.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        parts.mlp = partial(parts.mlp.func, submodules=replace(parts.mlp.keywords["submodules"], linear_fc1=TEColumnParallelLinear))
