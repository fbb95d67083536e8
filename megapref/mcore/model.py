"""The one factory of models. Training and Core's inference engine run the same `SegmentedGPT`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn import Module, Parameter

from megapref.batch import ModelSpec
from megapref.config import Kernels, Parallel, Precision
from megapref.mcore import cpu
from megapref.mcore.attention import softcapped
from megapref.mcore.kernels import Choice, choose, machine
from megapref.mcore.layers import NORMS_IN_LINEAR, DecoderConfig, LastLayer, customise
from megapref.mcore.norm import Norm
from megapref.mcore.segments import SegmentParams

_RECOMPUTE = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


# Core's names of Transformer Engine's recipes.
_RECIPES = {"delayed": "delayed", "current": "tensorwise", "blockwise": "blockwise", "mxfp8": "mxfp8"}


def build_model(
    spec: ModelSpec,
    parallel: Parallel,
    precision: Precision | None = None,
    kernels: Kernels | None = None,
    groups: ProcessGroupCollection | None = None,
) -> list[Module]:
    """This process's part of the model, one module per chunk of layers, its weights not yet set (see convert.hf.load_hf).

    `groups`, for a model in another layout than that of the run, are its process groups; they have no pipeline.

    Errors: ValueError naming the option of `parallel`, `precision` or `kernels` that does not fit the model or the machine.
    """
    if "num_moe_experts" not in spec.transformer:  # such as a judge's model beside a mixture
        parallel = replace(parallel, expert=1, expert_tensor=None)
    check_layout(spec, parallel, is_trained=groups is None)
    precision = precision or Precision()
    kernels = kernels or Kernels()
    choice = choose(spec.transformer, parallel.tensor, precision, kernels, machine())
    if parallel.offload_layers and not choice.te_layers:
        raise ValueError(f"parallel.offload_layers={parallel.offload_layers} needs Transformer Engine's layers: {choice.why['layers']}; use 0")
    with cpu.core_calls():
        config = _transformer_config(spec, parallel, precision, choice, kernels.decoding_graphs)
        stages = range(parallel.virtual_pipeline) if parallel.virtual_pipeline > 1 else [None]
        return [SegmentedGPT(spec, config, stage, groups) for stage in stages]


class SegmentedGPT(GPTModel):
    """Core's GPT, which also runs packs: called with `SegmentParams` it returns hidden states without the head (see forward_pack), otherwise logits.

    `true_vocab_size` is the number of words; logits may have more columns, those that make the vocabulary divide by the tensor-parallel size.
    `virtual_stage` is the number of this chunk of layers where a pipeline stage has several.
    """

    def __init__(
        self, spec: ModelSpec, config: DecoderConfig, virtual_stage: int | None = None, groups: ProcessGroupCollection | None = None
    ):
        is_first, is_last = (
            groups is not None or where(ignore_virtual=False, vp_stage=virtual_stage)
            for where in (parallel_state.is_pipeline_first_stage, parallel_state.is_pipeline_last_stage)
        )
        if config.te_layers:
            # Core asks for apex's kernel where gradients are accumulated in matrix products and a layer is its own. Only the head is one, and its
            # gradient is this package's (forward.py); Transformer Engine's layers have a kernel of theirs.
            layers._grad_accum_fusion_available = True
        super().__init__(
            config,
            _block_spec(config, virtual_stage, groups, is_last),
            vocab_size=spec.padded_vocab_size(config.tensor_model_parallel_size),
            max_sequence_length=spec.max_positions,
            pre_process=is_first,
            post_process=is_last,
            share_embeddings_and_output_weights=spec.tied,
            position_embedding_type="rope",
            vp_stage=virtual_stage,
            pg_collection=groups,
        )
        self.true_vocab_size = spec.vocab_size
        self.expert_rank = (parallel_state.get_expert_model_parallel_group() if groups is None else groups.ep).rank()
        if self.pre_process and config.embedding_scale is not None:
            self.embedding.register_forward_hook(lambda module, inputs, output: output * output.new_tensor(config.embedding_scale))
        self.rotary_pos_emb = RotaryTable(spec, config)

    def _preprocess(self, input_ids, position_ids, decoder_input=None, *args, packed_seq_params=None, **kwargs):
        if not self.pre_process and self.config.fp8:  # of which Core (0.19) would clear padding that a later stage of the pipeline has not
            decoder_input = torch.empty(0)
        decoder_input, rotary, *rest = super()._preprocess(
            input_ids, position_ids, decoder_input, *args, packed_seq_params=packed_seq_params, **kwargs
        )
        if isinstance(packed_seq_params, SegmentParams):
            rotary = self.rotary_pos_emb.table.index_select(0, position_ids[0])
        return decoder_input, rotary, *rest

    def _postprocess(self, hidden_states, *args, packed_seq_params=None, **kwargs):
        if isinstance(packed_seq_params, SegmentParams):
            return hidden_states
        output = super()._postprocess(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)
        return softcapped(output, self.config.logit_softcap) if self.post_process else output


class RotaryTable(RotaryEmbedding):
    """The rotary angles [positions, 1, 1, D] of a model's own frequencies, computed once; [.., 2 * D] where some layers have others.

    Core's class knows one base and Llama 3's scaling with fixed constants, and computes and keeps a table for every length it is asked for.
    """

    def __init__(self, spec: ModelSpec, config: DecoderConfig):
        super().__init__(config.kv_channels, 1.0, use_cpu_initialization=config.use_cpu_initialization)
        positions = torch.arange(spec.max_positions, device=self.inv_freq.device).float()
        tables = []
        for frequencies in filter(None, (spec.rotary_frequencies, spec.local_rotary_frequencies)):
            angles = torch.outer(positions, torch.tensor(frequencies, dtype=torch.float32, device=positions.device))
            tables += [angles, angles]
        self.table = torch.cat(tables, -1)[:, None, None]

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group=None) -> Tensor:
        """The angles of positions `offset` to `offset + max_seq_len`, or to the model's last position if that is nearer."""
        return self.table[offset : offset + max_seq_len]


def named_weights(chunks: list[Module]) -> Iterator[tuple[str, dict[str, int], Parameter]]:
    """(name as in ModelSpec.weights, what its placeholders stand for, counted in the whole model, parameter) of every parameter of this process."""
    for model in unwrap_model(chunks):
        for name, parameter in model.named_parameters():
            numbers = {}
            if match := re.match(r"decoder\.layers\.(\d+)\.", name):
                numbers["layer"] = model.decoder.layers[int(match[1])].layer_number - 1
                name = "decoder.layers.{layer}." + name[match.end() :]
            # Core's experts one by one, and Transformer Engine's, which are parameters of one layer.
            if match := re.search(r"\.(?:local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)|(linear_fc[12])\.(weight|bias)(\d+))$", name):
                local = model.config.num_moe_experts // model.config.expert_model_parallel_size
                numbers["expert"] = int(match[1] or match[6]) + local * model.expert_rank
                name = f"{name[: match.start()]}.local_experts.{{expert}}.{match[2] or match[4]}.{match[3] or match[5]}"
            for local, fused in NORMS_IN_LINEAR.items():
                name = name.replace(fused, local)
            yield name, numbers, parameter


@torch.no_grad()
def set_weight(parameter: Parameter, values: Tensor) -> None:
    """Puts `values` into a parameter. One that is kept in FP8 also gets them as they are, for the optimizer to start from."""
    quantizer = getattr(parameter, "_quantizer", None)  # Transformer Engine's, of a parameter in FP8
    if hasattr(quantizer, "amax"):  # the delayed recipe's would go on with a scale of 1, and with the largest value of memory that was not set
        quantizer.amax.zero_()
        quantizer.scale.copy_(torch.finfo(torch.float8_e4m3fn).max / values.abs().max().clamp(min=1e-12))
    parameter.copy_(values)
    if (exact := getattr(parameter, "_high_precision_init_val", None)) is not None:
        exact.copy_(values)


def check_layout(spec: ModelSpec, parallel: Parallel, is_trained: bool = True) -> None:
    """Raises ValueError when the model cannot be split as `parallel` says."""
    sizes = spec.transformer
    for option, number, rule in (
        ("tensor", sizes["num_query_groups"], "key-value heads"),
        ("tensor", sizes["num_attention_heads"], "attention heads"),
        ("tensor", sizes["ffn_hidden_size"], "MLP width"),
    ):
        size = getattr(parallel, option)
        if number % size:
            fitting = [str(n) for n in range(1, min(number, 64) + 1) if number % n == 0]
            raise ValueError(f"parallel.{option}={size} does not divide the model's {rule} ({number}); use {', '.join(fitting)}")
    parallel.stage_layers(sizes["num_layers"])
    experts = sizes.get("num_moe_experts", 1)
    if experts % parallel.expert:
        raise ValueError(f"parallel.expert={parallel.expert} does not divide the model's number of experts ({experts}); use a divisor")
    if sizes.get("moe_ffn_hidden_size", sizes["ffn_hidden_size"]) % parallel.expert_parts:
        raise ValueError(f"parallel.expert_tensor={parallel.expert_parts} does not divide the width of the model's experts; use a divisor")
    if "num_moe_experts" in sizes and parallel.tensor > 1 and not parallel.sequence and is_trained:
        raise ValueError(f"parallel.tensor={parallel.tensor} with a mixture of experts needs parallel.sequence=true, which Core asks for")
    if parallel.sequence and parallel.tensor == 1:
        raise ValueError("parallel.sequence=true splits rows over tensor-parallel ranks: it needs parallel.tensor of 2 or more")


def _transformer_config(spec: ModelSpec, parallel: Parallel, precision: Precision, choice: Choice, decoding_graphs: int) -> DecoderConfig:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision.dtype]
    return DecoderConfig(
        **spec.transformer,
        te_layers=choice.te_layers,
        te_attention=choice.te_attention,
        kept_in_bf16=precision.kept_layers(spec.transformer["num_layers"]),
        pad_multiple=precision.pad_multiple,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_parts,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        # With virtual stages Core (0.19) trains on wrong gradients, silently, when sends are batched, its default.
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        sequence_parallel=parallel.sequence,
        tp_comm_overlap=parallel.tp_comm_overlap,
        variable_seq_lengths=parallel.pipeline > 1,  # packs differ in length
        moe_token_dispatcher_type="alltoall",  # the default refuses packs that differ in length, mixture of experts or not
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,  # one place divides by the global count: Core must not divide by the number of packs
        attention_dropout=0.0,
        hidden_dropout=0.0,
        perform_initialization=False,
        use_cpu_initialization=cpu.ACTIVE,
        # Graphs of the whole block, in generation alone: packs differ in length, a graph would have to be captured for each.
        **({"cuda_graph_impl": "local", "inference_cuda_graph_scope": "block", "cuda_graph_modules": []} if decoding_graphs else {}),
        decoding_graphs=decoding_graphs,
        **_RECOMPUTE[parallel.recompute],
        cpu_offloading=parallel.offload_layers > 0,
        cpu_offloading_num_layers=parallel.offload_layers,
        **_fp8(precision),
        moe_grouped_gemm=choice.te_layers and "num_moe_experts" in spec.transformer,
        bias_activation_fusion=choice.fused_activation,
        bias_dropout_fusion=choice.fused_bias_dropout,
        apply_rope_fusion=choice.fused_rope,
        gradient_accumulation_fusion=choice.fused_gradients,
        masked_softmax_fusion=False,  # of attention written out, which is not used
        persist_layer_norm=False,  # of apex's norm, which is not used
    )


def _fp8(precision: Precision) -> dict[str, Any]:
    """Core's options of FP8: forward in e4m3, gradients in e5m2 where the scale is one of a whole tensor; blocks of their own need no e5m2."""
    if precision.fp8 is None:
        return {}
    return {
        "fp8": "hybrid" if precision.fp8 in ("delayed", "current") else "e4m3",
        "fp8_recipe": _RECIPES[precision.fp8],
        "fp8_param": precision.fp8_weights,
        "fp8_amax_history_len": precision.amax_history,
        "fp8_amax_compute_algo": "max",
    }


def _block_spec(
    config: DecoderConfig, virtual_stage: int | None, groups: ProcessGroupCollection | None, is_last: bool
) -> TransformerBlockSubmodules:
    """Core's own layers with this package's parts in them (layers.py); the model's last one, in the chunk that `is_last`, is a `LastLayer`."""
    options = {"qk_layernorm": config.qk_layernorm, "moe_grouped_gemm": config.moe_grouped_gemm}
    if config.te_layers:
        layer = get_gpt_layer_with_transformer_engine_spec(config.num_moe_experts, **options)
    else:
        layer = get_gpt_layer_local_spec(config.num_moe_experts, normalization=config.normalization, **options)
    customise(layer, config, parallel_state.get_tensor_model_parallel_group() if groups is None else groups.tp)
    layers = [layer] * get_num_layers_to_build(config, virtual_stage, None if groups is None else 0)
    if is_last:
        layers[-1] = replace(layer, module=LastLayer)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm)
