"""How many parameters a rank holds, exactly, from a ModelSpec and a layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Literal

from megapref.batch import ModelSpec

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Layout:
    """How a model and a batch are spread over GPUs; the names of config.Parallel, what is left for data parallelism, and recomputation.

    `recompute` in backward: nothing; `selective`, the attention between its projections; `full`, whole layers from their inputs.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    data: int = 1
    sequence: bool = False
    recompute: Recompute = "none"

    @property
    def num_gpus(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    def __str__(self) -> str:
        """Such as `tp8+sp pp16x2 dp8 recompute`; what is 1 or off is left out."""
        parts = [
            f"tp{self.tensor}{'+sp' if self.sequence else ''}" if self.tensor > 1 else "",
            f"pp{self.pipeline}{f'x{self.virtual_pipeline}' if self.virtual_pipeline > 1 else ''}" if self.pipeline > 1 else "",
            f"cp{self.context}" if self.context > 1 else "",
            f"dp{self.data}",
            {"none": "", "selective": "recompute-attn", "full": "recompute"}[self.recompute],
        ]
        return " ".join(part for part in parts if part)

    def numbers(self) -> dict[str, int | bool | str]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Sizes:
    """The numbers of a decoder that memory and time depend on, out of a ModelSpec."""

    layers: int
    hidden: int
    heads: int
    groups: int
    width: int  # of a head
    ffn: int  # what a token passes through: of a mixture of experts, all of its experts together
    gated: bool
    rms: bool  # RMS norm, otherwise layer norm
    qk_norm: bool
    norms: int  # of a layer
    vocab: int

    @classmethod
    def of(cls, spec: ModelSpec) -> Sizes:
        t = spec.transformer
        return cls(
            layers=t["num_layers"],
            hidden=t["hidden_size"],
            heads=t["num_attention_heads"],
            groups=t["num_query_groups"],
            width=t["kv_channels"],
            ffn=t.get("moe_ffn_hidden_size", t["ffn_hidden_size"]) * (t["moe_router_topk"] if "num_moe_experts" in t else 1),
            gated=t.get("gated_linear_unit", False),
            rms=t.get("normalization") == "RMSNorm",
            qk_norm=t.get("qk_layernorm", False) or t.get("projection_qk_norm", False),
            norms=2 * t.get("pre_norms", True) + 2 * t.get("post_norms", False),
            vocab=spec.vocab_size,
        )


def stage_layers(num_layers: int, stages: int) -> list[int] | None:
    """Layers of each pipeline stage: equally many, or, where embedding and head count as a layer each, one fewer at both ends; else None."""
    if num_layers % stages == 0:
        return [num_layers // stages] * stages
    if (num_layers + 2) % stages == 0 and (num_layers + 2) // stages > 1:
        each = (num_layers + 2) // stages
        return [each - 1, *[each] * (stages - 2), each - 1]
    return None


def shard_sizes(spec: ModelSpec, layout: Layout, stage: int) -> Iterator[tuple[str, int]]:
    """(name in ModelSpec.weights, elements) of every parameter that a rank of pipeline stage `stage` holds."""
    layers = stage_layers(spec.transformer["num_layers"], layout.pipeline)
    assert layers is not None, f"{spec.transformer['num_layers']} layers on {layout.pipeline} stages"
    first, last = stage == 0, stage == layout.pipeline - 1
    for name, (kind, _) in spec.weights.items():
        size = _shard_size(name, kind, spec, layout.tensor)
        if "{layer}" in name:
            for _ in range(layers[stage] * _copies(name, spec)):
                yield name, size
        elif name.startswith("embedding."):
            if first:
                yield name, size
        elif last and not (name == "output_layer.weight" and spec.tied and first):  # tied, the embedding is the head where both are
            yield name, size


def num_parameters(spec: ModelSpec, layout: Layout = Layout(), stage: int = 0) -> int:
    """Parameters on a rank of the stage; by default of the whole model."""
    return sum(size for _, size in shard_sizes(spec, layout, stage))


def layer_matmul_parameters(spec: ModelSpec, tensor: int) -> int:
    """Parameters of one layer that are matrices, on a tensor-parallel rank, and multiply a token: every one, or those of its experts."""
    return sum((spec.transformer["moe_router_topk"] if "{expert}" in name else 1) * size for name, size in _layer_matrices(spec, tensor))


def matrix_parameters(spec: ModelSpec, layout: Layout, stage: int) -> int:
    """Of the parameters that a rank of a stage holds, those of its layers that are matrices."""
    layers = stage_layers(spec.transformer["num_layers"], layout.pipeline)[stage]
    return layers * sum(_copies(name, spec) * size for name, size in _layer_matrices(spec, layout.tensor))


def _layer_matrices(spec: ModelSpec, tensor: int) -> Iterator[tuple[str, int]]:
    """(name in ModelSpec.weights, elements of a tensor-parallel rank's part) of every matrix that a layer has."""
    for name, (kind, _) in spec.weights.items():
        if "{layer}" in name and len(_whole_shape(name, spec, 1)) > 1:
            yield name, _shard_size(name, kind, spec, tensor)


def buffer_size(spec: ModelSpec, layout: Layout, stage: int) -> int:
    """Elements of Core's contiguous buffers of parameters, and of gradients, which the distributed optimizer shards.

    Each parameter starts at a multiple of 64, each bucket ends at a multiple of lcm(data-parallel ranks, 128); an embedding that two stages
    share is a bucket of its own (megatron/core/optimizer/param_layout.py, distrib_optimizer.py).
    """
    end = math.lcm(layout.data * layout.context, 128)
    shared = {"embedding.word_embeddings.weight", "output_layer.weight"} if spec.tied and layout.pipeline > 1 else set()
    buckets = {True: 0, False: 0}
    for name, size in shard_sizes(spec, layout, stage):
        buckets[name in shared] += _up(size, 64)
    return sum(_up(size, end) for size in buckets.values())


def _copies(name: str, spec: ModelSpec) -> int:
    """How many parameters of a layer have this name."""
    return spec.transformer["num_moe_experts"] if "{expert}" in name else 1


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@cache
def _part_of(kind: str) -> int | None:
    """The dimension that tensor-parallel ranks split (convert/mapping.py), None for none."""
    dimensions = {"replicated": None, "row": 1, "column": 0, "vocab": 0, "gated": 0, "qkv": 0}
    if kind not in dimensions:
        raise ValueError(f"the planner does not know how weights of kind {kind!r} are split; add it to megapref/plan/shapes.py")
    return dimensions[kind]


def _shard_size(name: str, kind: str, spec: ModelSpec, tensor: int) -> int:
    elements = math.prod(_whole_shape(name, spec, tensor))
    return elements if _part_of(kind) is None else elements // tensor


def _whole_shape(name: str, spec: ModelSpec, tensor: int) -> tuple[int, ...]:
    """The shape of a parameter over all tensor-parallel ranks, by the end of its name."""
    m = Sizes.of(spec)
    t = spec.transformer
    ffn, expert_ffn, doubled = t["ffn_hidden_size"], t.get("moe_ffn_hidden_size", t["ffn_hidden_size"]), 2 if m.gated else 1
    qkv, vocab = (m.heads + 2 * m.groups) * m.width, spec.padded_vocab_size(tensor)
    normed = (m.heads, m.groups) if t.get("projection_qk_norm") else (1, 1)
    shapes = {
        "word_embeddings.weight": (vocab, m.hidden),
        "output_layer.weight": (vocab, m.hidden),
        "self_attention.linear_qkv.weight": (qkv, m.hidden),
        "self_attention.linear_qkv.bias": (qkv,),
        "self_attention.linear_proj.weight": (m.hidden, m.heads * m.width),
        "self_attention.linear_proj.bias": (m.hidden,),
        "mlp.linear_fc1.weight": (ffn * doubled, m.hidden),
        "mlp.linear_fc1.bias": (ffn * doubled,),
        "mlp.linear_fc2.weight": (m.hidden, ffn),
        "mlp.linear_fc2.bias": (m.hidden,),
        "mlp.router.weight": (t.get("num_moe_experts"), m.hidden),
        "{expert}.linear_fc1.weight": (expert_ffn * doubled, m.hidden),
        "{expert}.linear_fc2.weight": (m.hidden, expert_ffn),
        "q_layernorm.weight": (m.width * normed[0],),
        "k_layernorm.weight": (m.width * normed[1],),
        "post_norm.weight": (m.hidden,),
        "layernorm.weight": (m.hidden,),
        "layernorm.bias": (m.hidden,),
    }
    for end, shape in shapes.items():
        if name.endswith(end):
            return shape
    raise ValueError(f"the planner does not know the shape of {name}; add it to megapref/plan/shapes.py")
