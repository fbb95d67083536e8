"""What a checkpoint holds of a training state, as Core's sharded tensors, and how an optimizer takes it back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint import FileSystemReader

from megapref.mcore.reference import Reference
from megapref.mcore.step import TrainState

# Core's format that can be loaded at another tensor, pipeline or data-parallel size.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "singleton_local_shards": False, "chained_optim_avoid_prefix": True}
_PICKLES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def model_entries(chunks: list[torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    """The model's chunks by the names that they have in a checkpoint."""
    chunks = unwrap_model(chunks)
    return [("model" if len(chunks) == 1 else f"model{i}", chunk) for i, chunk in enumerate(chunks)]


def sharded_state(state: TrainState, is_loading: bool) -> dict:
    """Model, optimizer and a moving reference."""
    metadata = ensure_metadata_has_dp_cp_group(dict(METADATA))
    sharded = {name: model.sharded_state_dict(metadata=metadata) for name, model in model_entries(state.chunks)}
    _make_adam_state(state.optimizer)
    with _buckets_without_padding(state.optimizer):
        sharded["optimizer"] = state.optimizer.sharded_state_dict(dict(sharded), is_loading=is_loading, metadata=metadata)
    if state.moving_reference:
        sharded["reference"] = _sharded_reference(state.moving_reference, metadata)
    return sharded


def without_missing_scales(sharded: dict, path: Path) -> dict:
    """`sharded` without what a checkpoint lacks of Transformer Engine's layers' own state, FP8 scales: one that was made without those layers.

    They start with fresh ones then.
    """
    saved = FileSystemReader(path).read_metadata().state_dict_metadata  # Core's reader of it (0.19) fails at what this torch writes of tensors
    missing = lambda entry: isinstance(entry, ShardedObject) and "_extra_state" in entry.key and entry.unique_key not in saved  # noqa: E731
    return extract_matching_values(sharded, missing)[1]


def load_module(module: torch.nn.Module, weights: dict) -> None:
    """Core's `load_state_dict`, which may lack such state and nothing else."""
    with _pickled_scales():
        problems = module.load_state_dict(weights, strict=False)
    wrong = [name for name in (*problems.missing_keys, *problems.unexpected_keys) if not name.endswith("_extra_state")]
    assert not wrong, f"the checkpoint and the model differ in {wrong}"


@contextmanager
def _pickled_scales() -> Iterator[None]:
    """Lets Transformer Engine (2.20) read the scales of the delayed recipe, which it saves as a pickle and by default refuses to read.

    Nothing is trusted that was not before: torch reads a checkpoint's index as a pickle, too.
    """
    before = os.environ.get(_PICKLES)
    os.environ[_PICKLES] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PICKLES]
        else:
            os.environ[_PICKLES] = before


@contextmanager
def _buckets_without_padding(optimizer) -> Iterator[None]:
    """Where each parameter is in a buffer, counted as Core (0.19) joins the buffer's buckets to save them: without the padding between them.

    Core looks the joined values up by where they are with the padding. Behind a first bucket that is padded, such as that of a tied embedding on the
    last stage, it would save every parameter's neighbours.
    """
    buffers = [buffer for part in optimizer.chained_optimizers for buffer in part.buffers]
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
        shifts = [bucket.offset - before for bucket, before in zip(buffer.buckets, accumulate(sizes, initial=0), strict=False)]
        buffer.param_index_map = {
            parameter: (start - shifts[bucket], end - shifts[bucket], bucket) for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, index_map in zip(buffers, padded, strict=True):
            buffer.param_index_map = index_map


def _sharded_reference(reference: Reference, metadata: dict) -> dict:
    """The reference's weights beside the policy's, copied where they are in the policy's place only for the moment."""
    with reference.in_place() as chunks:
        sharded = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in model_entries(chunks)}
        if reference.swapped:
            for tensor in nested_values(sharded):
                if isinstance(tensor, ShardedTensor | ShardedTensorFactory) and tensor.data is not None:
                    tensor.data = tensor.data.clone()
    add_prefix_for_sharding(sharded, "reference.")
    return sharded


def _torch_adams(optimizer) -> list[torch.optim.AdamW]:
    return [part.optimizer for part in optimizer.chained_optimizers if isinstance(part.optimizer, torch.optim.AdamW)]


def _make_adam_state(optimizer) -> None:
    """Core expects the state that torch's AdamW makes at its first step."""
    for adam in _torch_adams(optimizer):
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            if not adam.state[parameter]:
                adam.state[parameter].update(
                    step=torch.zeros((), device=parameter.device),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )


def adam_step_of(optimizer) -> float:
    """The updates made so far, which torch's AdamW counts for each parameter, fused ones for each group."""
    parts = [part.optimizer for part in optimizer.chained_optimizers]
    counts = [holder["step"] for adam in parts for holder in (*adam.state.values(), *adam.param_groups) if "step" in holder]
    return float(counts[0]) if counts else 0.0


def _lacks_scales(part) -> bool:
    """Whether Core (0.19) would put moments into Transformer Engine's Adam without a scale that fits them, which those in FP8 need."""
    return hasattr(part.optimizer, "set_scaled_state") and not part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8


def _set_scaled(part, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
    """Puts a parameter's weights and moments in float32 into the optimizer."""
    group, order = part.model_param_group_index_map[model_param]
    weights = part.optimizer.param_groups[group]["params"][order]
    weights.copy_(tensors["param"])
    for name in part.optimizer.state[weights]:
        part.optimizer.set_scaled_state(weights, name, tensors[name])


def load_optimizer(optimizer, loaded: dict, adam_step: float) -> None:
    """Puts in moments and weights. The options (rate, decay, betas, ...) stay those of this run's config, which Core would replace."""
    parts = optimizer.chained_optimizers
    # With shared experts Core has an optimizer for them and one for the rest; what is saved has the entries of the layout that saved it, too.
    contents = [loaded] if len(parts) == 1 else [loaded[i] for i in range(len(parts))]
    for part, content in zip(parts, contents, strict=True):
        entries = list(part.optimizer.state.values())
        for entry in entries:
            entry.pop("step", None)  # Core (0.19) would look for it among the saved tensors
        if _lacks_scales(part):
            part._set_main_param_and_optimizer_states = partial(_set_scaled, part)
        part.load_parameter_state_from_fully_reshardable(content["param_state"])
        if isinstance(part.optimizer, torch.optim.AdamW):
            for entry in entries:  # one tensor each: a shared one would be advanced once per parameter
                entry["step"] = torch.tensor(float(adam_step), device=entry["exp_avg"].device)
        else:
            for group in part.optimizer.param_groups:
                group["step"] = int(adam_step)
