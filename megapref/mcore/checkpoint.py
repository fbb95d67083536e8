"""Checkpoints that are complete and verified, or ignored.

A checkpoint is written into a folder with a temporary name; `manifest.json`, with the size and SHA-256 of every file, is written last, and only
then does the folder get its name `step_<n>`. A save that is killed leaves the earlier checkpoints as they were.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import queue
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint import CheckpointException

from megapref import phases
from megapref.mcore import cpu, setup
from megapref.mcore.reference import Reference
from megapref.mcore.step import TrainState

# Core's format that can be loaded at another tensor, pipeline or data-parallel size.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "singleton_local_shards": False, "chained_optim_avoid_prefix": True}
_MANIFEST = "manifest.json"
# Core's writer hands results over in a queue of a process of its own, which a killed run would leave behind; this process both puts and gets.
filesystem_async._results_queue = queue.SimpleQueue()


def save_checkpoint(state: TrainState, folder: Path, keep: int, extra: dict, protected: Collection[int] = ()) -> Path:
    """Writes `folder/step_<n>` with model, optimizer and `extra` (JSON), then removes all but the newest `keep` and the `protected` steps'.

    Collective. ValueError on every rank when any rank could not write; earlier checkpoints are untouched then.
    """
    final = path_of(folder, state.step)
    temporary = folder / f".writing_step_{state.step:06d}"
    content = {"step": state.step, "adam_step": _adam_step(state.optimizer), "bad_steps": state.bad_steps, "log_ratios": state.log_ratios}
    content |= {"has_reference": state.moving_reference is not None, **extra}
    try:
        setup.on_first_rank(_make_empty)(temporary)
        _write_state(state, temporary)
        setup.on_first_rank((temporary / "state.json").write_text)(json.dumps(content))
        checksums = setup.gather_over_world(setup.on_every_rank(_checksums)(temporary, dist.get_rank(), dist.get_world_size()))
        setup.on_first_rank(_finish)(temporary, final, {name: entry for part in checksums for name, entry in part.items()})
    except ValueError as error:
        raise ValueError(f"cannot write the checkpoint {final}: {error}; free space or choose another run.dir") from error
    if setup.is_first_rank():
        kept = {path_of(folder, step) for step in protected}
        for old in [path for path in _checkpoints(folder)[:-keep] if path not in kept]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step_{step:06d}"


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder was made by `save_checkpoint`."""
    return (folder / _MANIFEST).is_file()


def load_checkpoint(state: TrainState, path: Path) -> dict:
    """Loads a checkpoint, saved at any layout, into `state` and returns its `extra`. ValueError when a file is missing or changed."""
    problem = verify(path)
    if problem:
        raise ValueError(f"checkpoint {path} is not usable: {problem}; run.resume takes the folder of one, such as checkpoints/step_000010")
    saved = json.loads((path / "state.json").read_text())
    if state.moving_reference and not saved["has_reference"]:
        raise ValueError(f"checkpoint {path} has no reference of its own, which reference.sync_steps needs; resume with reference.sync_steps=0")
    with cpu.core_calls():
        loaded = dist_checkpointing.load(_sharded_state(state, is_loading=True), str(path))
        for name, model in _model_entries(state.chunks):
            model.load_state_dict(loaded[name])
        _load_optimizer(state.optimizer, loaded["optimizer"], saved["adam_step"])
        if state.moving_reference:
            with state.moving_reference.in_place() as chunks:
                for name, chunk in _model_entries(chunks):
                    chunk.load_state_dict(loaded["reference"][name])
    state.step, state.bad_steps, state.log_ratios = saved["step"], saved["bad_steps"], tuple(saved["log_ratios"])
    return saved


def load_weights(chunks: list[torch.nn.Module], path: Path) -> None:
    """Loads a checkpoint's model, saved at any layout, into chunks that are not trained. ValueError when a file is missing or changed."""
    problem = verify(path)
    if problem:
        raise ValueError(f"checkpoint {path} is not usable: {problem}; choose another one")
    metadata = ensure_metadata_has_dp_cp_group(dict(_METADATA))
    with cpu.core_calls():
        sharded = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _model_entries(chunks)}
        loaded = dist_checkpointing.load(sharded, str(path))
    for name, chunk in _model_entries(chunks):
        chunk.load_state_dict(loaded[name])


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all as they were written, None where there is none yet. Collective; unusable ones are named on stderr.

    ValueError when there are checkpoints, but none is usable.
    """
    paths = setup.gather_over_world(setup.on_first_rank(_checkpoints)(folder))[0]
    for path in reversed(paths):
        problem = verify(path)
        if problem is None:
            return path
        if setup.is_first_rank():
            print(f"passing over checkpoint {path}: {problem}", file=sys.stderr, flush=True)
    if paths:
        raise ValueError(f"{folder}: none of the {len(paths)} checkpoints is usable; start again with another run.dir")
    return None


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. Collective: each rank reads a share of them."""
    problem = None
    try:
        entries = json.loads((path / _MANIFEST).read_text())
        for name, (num_bytes, digest) in sorted(entries.items())[dist.get_rank() :: dist.get_world_size()]:
            if (path / name).stat().st_size != num_bytes or _sha256(path / name) != digest:
                problem = f"{name} is not what was saved"
                break
    except (OSError, ValueError, AttributeError, TypeError) as caught:
        problem = f"{type(caught).__name__}: {caught}"
    return next(filter(None, setup.gather_over_world(problem)), None)


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Renames the checkpoints of later steps, which a resumed run does again, to `unused_step_<n>`; returns their new paths. Not collective."""
    renamed = []
    for path in _checkpoints(folder):
        if int(path.name.removeprefix("step_")) > step:
            names = (folder / f"unused_{path.name}{f'_{i}' if i else ''}" for i in itertools.count())
            renamed.append(path.rename(next(name for name in names if not name.exists())))
    return renamed


def _checkpoints(folder: Path) -> list[Path]:
    """All that have the name of a checkpoint, by step."""
    paths = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step_")))


def _make_empty(folder: Path) -> None:
    for killed in folder.parent.glob(".writing_step_*"):
        shutil.rmtree(killed)
    folder.mkdir(parents=True)


def _write_state(state: TrainState, folder: Path) -> None:
    """Core's writing of model and optimizer, in which ranks wait for each other; where one cannot write, all raise ValueError."""
    error = None
    try:
        with cpu.core_calls():
            dist_checkpointing.save(_sharded_state(state, is_loading=False), str(folder), content_metadata=_METADATA)
    except CheckpointException as caught:  # a BaseException, on every rank; its text has the traceback of each
        failures = [f"rank {rank}: {type(failure).__name__}: {failure}" for rank, (failure, _) in caught.failures.items()]
        error = ValueError("; ".join(failures) or "another rank failed")
    except (OSError, RuntimeError, dist_checkpointing.core.CheckpointingException) as caught:
        error = ValueError(str(caught))
    setup.agree(error)


def _checksums(folder: Path, part: int, num_parts: int) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every n-th file."""
    files = sorted(folder.iterdir())[part::num_parts]
    return {file.name: (file.stat().st_size, _sha256(file)) for file in files}


def _finish(temporary: Path, final: Path, checksums: dict[str, tuple[int, str]]) -> None:
    """The manifest, then the name."""
    (temporary / _MANIFEST).write_text(json.dumps(checksums, indent=1))
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    os.rename(temporary, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    phases.moved()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _model_entries(chunks: list[torch.nn.Module]):
    chunks = unwrap_model(chunks)
    return [("model" if len(chunks) == 1 else f"model{i}", chunk) for i, chunk in enumerate(chunks)]


def _sharded_state(state: TrainState, is_loading: bool) -> dict:
    metadata = ensure_metadata_has_dp_cp_group(dict(_METADATA))
    sharded = {name: model.sharded_state_dict(metadata=metadata) for name, model in _model_entries(state.chunks)}
    _make_adam_state(state.optimizer)
    with _buckets_without_padding(state.optimizer):
        sharded["optimizer"] = state.optimizer.sharded_state_dict(dict(sharded), is_loading=is_loading, metadata=metadata)
    if state.moving_reference:
        sharded["reference"] = _sharded_reference(state.moving_reference, metadata)
    return sharded


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
        sharded = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _model_entries(chunks)}
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


def _adam_step(optimizer) -> float:
    """The updates made so far, which torch's AdamW counts for each parameter, fused ones for each group."""
    parts = [part.optimizer for part in optimizer.chained_optimizers]
    counts = [holder["step"] for adam in parts for holder in (*adam.state.values(), *adam.param_groups) if "step" in holder]
    return float(counts[0]) if counts else 0.0


def _load_optimizer(optimizer, loaded: dict, adam_step: float) -> None:
    """Puts in moments and weights. The options (rate, decay, betas, ...) stay those of this run's config, which Core would replace."""
    parts = optimizer.chained_optimizers
    contents = [loaded] if len(parts) == 1 else [loaded[i] for i in sorted(loaded)]
    for part, content in zip(parts, contents, strict=True):
        entries = list(part.optimizer.state.values())
        for entry in entries:
            entry.pop("step", None)  # Core (0.19) would look for it among the saved tensors
        part.load_parameter_state_from_fully_reshardable(content["param_state"])
        if isinstance(part.optimizer, torch.optim.AdamW):
            for entry in entries:  # one tensor each: a shared one would be advanced once per parameter
                entry["step"] = torch.tensor(float(adam_step), device=entry["exp_avg"].device)
        else:
            for group in part.optimizer.param_groups:
                group["step"] = int(adam_step)
