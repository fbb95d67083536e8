"""How one Core parameter is made of Hugging Face tensors, as pure and invertible moves.

| kind       | Hugging Face tensors       | Core parameter, split over tensor-parallel ranks                                    |
|------------|----------------------------|-------------------------------------------------------------------------------------|
| replicated | one                        | the same on every rank                                                              |
| column     | one                        | rows split                                                                          |
| row        | one                        | columns split                                                                       |
| vocab      | one                        | rows split, zero rows added at the end until they divide                            |
| gated      | gate, up                   | rows of each split; a rank's gate rows, then its up rows                            |
| qkv        | query, key, value          | for each query group its query rows, key rows and value rows; whole groups per rank |

A name for several tensors means that they are stored as one, below each other.

A rank needs one contiguous piece of every Hugging Face tensor (`piece`), which `fuse` joins; `from_shards` undoes both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megapref.batch import ModelSpec


def parameters(spec: ModelSpec) -> list[tuple[str, dict[str, int]]]:
    """Every parameter of the model: its name in ModelSpec.weights, and what the placeholders stand for. A tied output layer is the embedding."""
    layers, experts = range(spec.transformer["num_layers"]), range(spec.transformer.get("num_moe_experts", 0))
    found: list[tuple[str, dict[str, int]]] = []
    for name in spec.weights:
        if "{expert}" in name:
            found += [(name, {"layer": layer, "expert": expert}) for layer in layers for expert in experts]
        elif "{layer}" in name:
            found += [(name, {"layer": layer}) for layer in layers]
        elif not (spec.tied and name == "output_layer.weight"):
            found.append((name, {}))
    return found


def tensor_names(spec: ModelSpec) -> set[str]:
    """Every Hugging Face tensor of the model."""
    return {tensor.format(**numbers) for name, numbers in parameters(spec) for tensor in spec.weights[name][1]}


def read_shard(
    core_name: str, numbers: dict[str, int], shape: tuple[int, ...], spec: ModelSpec, size: int, rank: int, stored: Callable[[str], Any]
) -> Tensor:
    """The Core parameter, of this shape, of tensor-parallel rank `rank` of `size`, reading no more than it needs.

    `stored(name)` has the Hugging Face tensor as safetensors gives it: get_shape(), and slices by indexing. ValueError when a shape is not what
    the model has.
    """
    kind, names = spec.weights[core_name]
    sources = [stored(name.format(**numbers)) for name in names]
    for source, (name, expected) in zip(sources, hf_shapes(core_name, numbers, shape, spec, size), strict=True):
        if tuple(source.get_shape()) != expected:
            raise ValueError(f"{name} has shape {tuple(source.get_shape())}, config.json makes it {expected}")
    parts = source_shapes(kind, shape, spec, size)
    if len(names) == len(parts):
        pieces = [source[piece(kind, part, size, rank)] for source, part in zip(sources, parts, strict=True)]
    else:
        starts = accumulate((part[0] for part in parts), initial=0)
        ranges = [(start, *piece(kind, part, size, rank)) for start, part in zip(starts, parts, strict=False)]
        pieces = [sources[0][(slice(start + rows.start, start + rows.stop), *others)] for start, rows, *others in ranges]
    return fuse(kind, pieces, spec, size)


def hf_shapes(
    core_name: str, numbers: dict[str, int], shape: tuple[int, ...], spec: ModelSpec, size: int = 1
) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of the Hugging Face tensors behind a Core parameter whose shard, one of `size`, has this shape."""
    kind, names = spec.weights[core_name]
    shapes = source_shapes(kind, shape, spec, size)
    if len(names) < len(shapes):
        shapes = [(sum(part[0] for part in shapes), *shapes[0][1:])]
    return [(name.format(**numbers), part) for name, part in zip(names, shapes, strict=True)]


def hf_tensors(core_name: str, numbers: dict[str, int], shards: Sequence[Tensor], spec: ModelSpec) -> list[tuple[str, Tensor]]:
    """The Hugging Face tensors, by name, that a Core parameter holds, from that of every tensor-parallel rank in order."""
    kind, names = spec.weights[core_name]
    tensors = from_shards(kind, shards, spec)
    if len(names) < len(tensors):
        tensors = [torch.cat(tensors)]
    return [(name.format(**numbers), tensor) for name, tensor in zip(names, tensors, strict=True)]


def to_shard(kind: str, tensors: Sequence[Tensor], spec: ModelSpec, size: int, rank: int) -> Tensor:
    """The Core parameter of tensor-parallel rank `rank` of `size`, from whole Hugging Face tensors."""
    return fuse(kind, [tensor[piece(kind, tuple(tensor.shape), size, rank)] for tensor in tensors], spec, size)


def from_shards(kind: str, shards: Sequence[Tensor], spec: ModelSpec) -> list[Tensor]:
    """The whole Hugging Face tensors, from the Core parameter of every tensor-parallel rank in order."""
    if kind == "replicated":
        return [shards[0]]
    if kind == "row":
        return [_joined(shards, 1)]
    if kind == "gated":
        return [_joined(parts) for parts in zip(*(shard.chunk(2) for shard in shards), strict=True)]
    whole = _joined(shards)
    if kind == "vocab":
        return [whole[: spec.vocab_size]]
    if kind == "qkv":
        grouped = whole.view(spec.transformer["num_query_groups"], -1, *whole.shape[1:])
        return [part.flatten(0, 1) for part in grouped.split(_rows_per_group(spec), 1)]
    assert kind == "column", kind
    return [whole]


def _joined(parts: Sequence[Tensor], dimension: int = 0) -> Tensor:
    """A lone part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dimension)


def piece(kind: str, shape: tuple[int, ...], size: int, rank: int) -> tuple[slice, ...]:
    """Which part of a Hugging Face tensor of this shape rank `rank` of `size` holds."""
    if kind == "replicated":
        return (slice(None),)
    dimension = 1 if kind == "row" else 0
    share = -(-shape[dimension] // size)
    start = min(rank * share, shape[dimension])
    return (slice(None),) * dimension + (slice(start, min(start + share, shape[dimension])),)


def fuse(kind: str, pieces: Sequence[Tensor], spec: ModelSpec, size: int) -> Tensor:
    """One rank's Core parameter, from its pieces of the Hugging Face tensors."""
    if kind == "gated":
        return torch.cat(list(pieces))
    if kind == "vocab":
        rows = spec.padded_vocab_size(size) // size
        return F.pad(pieces[0], (0, 0, 0, rows - len(pieces[0])))
    if kind == "qkv":
        groups = spec.transformer["num_query_groups"] // size
        return torch.cat([tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in pieces], 1).flatten(0, 1)
    return pieces[0]


def source_shapes(kind: str, shape: tuple[int, ...], spec: ModelSpec, size: int) -> list[tuple[int, ...]]:
    """The shapes of the whole Hugging Face tensors behind a Core parameter whose shard, one of `size`, has this shape."""
    if kind == "replicated":
        return [shape]
    if kind == "row":
        return [(shape[0], shape[1] * size, *shape[2:])]
    rows = shape[0] * size
    if kind == "gated":
        return [(rows // 2, *shape[1:])] * 2
    if kind == "vocab":
        return [(spec.vocab_size, *shape[1:])]
    if kind == "qkv":
        return [(spec.transformer["num_query_groups"] * part, *shape[1:]) for part in _rows_per_group(spec)]
    assert kind == "column", kind
    return [(rows, *shape[1:])]


def _rows_per_group(spec: ModelSpec) -> list[int]:
    width = spec.transformer["kv_channels"]
    return [spec.transformer["num_attention_heads"] // spec.transformer["num_query_groups"] * width, width, width]
