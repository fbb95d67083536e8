"""Checkpoints that are complete and verified, or ignored.

A checkpoint is written into a folder with a temporary name; `manifest.json`, with the size and SHA-256 of every file, is written last, and only
then does the folder get its name `step_<n>`. A save that is killed leaves the earlier checkpoints as they were.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import unwrap_model

from megapref.mcore import cpu, setup
from megapref.mcore.step import TrainState

# Core's format that can be loaded at another tensor, pipeline or data-parallel size.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "singleton_local_shards": False, "chained_optim_avoid_prefix": True}
_MANIFEST = "manifest.json"


def save_checkpoint(state: TrainState, folder: Path, keep: int, extra: dict) -> Path:
    """Writes `folder/step_<n>` with model, optimizer and `extra` (JSON), then removes all but the newest `keep`; returns its path.

    Collective. ValueError on every rank when any rank could not write; earlier checkpoints are untouched then.
    """
    final = folder / f"step_{state.step:06d}"
    temporary = folder / f".writing_step_{state.step:06d}"
    error = None
    try:
        if setup.is_first_rank():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    except OSError as caught:
        error = ValueError(f"cannot write a checkpoint to {folder}: {caught}; free space or choose another run.dir")
    setup.agree(error)
    try:
        with cpu.core_calls():
            dist_checkpointing.save(_sharded_state(state, is_loading=False), str(temporary), content_metadata=_METADATA)
    except (OSError, RuntimeError, dist_checkpointing.core.CheckpointingException) as caught:
        error = ValueError(f"cannot write a checkpoint to {temporary}: {caught}; free space or choose another run.dir")
    setup.agree(error)
    try:
        _finish(temporary, final, {"step": state.step, "adam_step": _adam_step(state.optimizer), "bad_steps": state.bad_steps, **extra})
    except OSError as caught:
        error = ValueError(f"cannot finish the checkpoint {final}: {caught}; free space or choose another run.dir")
    setup.agree(error)
    if setup.is_first_rank():
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(state: TrainState, path: Path) -> dict:
    """Loads a checkpoint, saved at any layout, into `state` and returns its `extra`. ValueError when a file is missing or changed."""
    problem = verify(path)
    if problem:
        raise ValueError(f"checkpoint {path} is not usable: {problem}; choose another one for run.resume")
    saved = json.loads((path / "state.json").read_text())
    _make_adam_state(state.optimizer)
    with cpu.core_calls():
        loaded = dist_checkpointing.load(_sharded_state(state, is_loading=True), str(path))
        for name, model in _model_entries(state):
            model.load_state_dict(loaded[name])
        steps = _pop_adam_steps(state.optimizer)
        state.optimizer.load_state_dict(loaded["optimizer"])
    for entry in steps:
        entry["step"] = torch.tensor(float(saved["adam_step"]))  # one tensor each: a shared one would be advanced once per parameter
    state.step, state.bad_steps = saved["step"], saved["bad_steps"]
    return saved


def load_weights(chunks: list[torch.nn.Module], path: Path) -> None:
    """Loads a checkpoint's model, saved at any layout, into chunks that are not trained. ValueError when a file is missing or changed."""
    problem = verify(path)
    if problem:
        raise ValueError(f"checkpoint {path} is not usable: {problem}; choose another one")
    metadata = ensure_metadata_has_dp_cp_group(dict(_METADATA))
    with cpu.core_calls():
        loaded = dist_checkpointing.load({"model": chunks[0].sharded_state_dict(metadata=metadata)}, str(path))
    chunks[0].load_state_dict(loaded["model"])


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all as they were written; None without one. Collective; unusable ones are named on stderr."""
    box = [None]
    if setup.is_first_rank():
        for path in reversed(_complete(folder)):
            problem = verify(path, collective=False)
            if problem is None:
                box = [path]
                break
            print(f"passing over checkpoint {path}: {problem}", flush=True)
    dist.broadcast_object_list(box, src=0)
    return box[0]


def verify(path: Path, collective: bool = True) -> str | None:
    """What is wrong with a checkpoint's files, or None; each rank reads a share of them when `collective`."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if collective else (0, 1)
    problem = None
    try:
        entries = json.loads((path / _MANIFEST).read_text())
        for name, (num_bytes, digest) in sorted(entries.items())[rank::size]:
            if (path / name).stat().st_size != num_bytes or _sha256(path / name) != digest:
                problem = f"{name} is not what was saved"
                break
    except (OSError, ValueError) as caught:
        problem = f"{type(caught).__name__}: {caught}"
    if not collective:
        return problem
    problems = [None] * size
    dist.all_gather_object(problems, problem)
    return next((entry for entry in problems if entry is not None), None)


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if (path / _MANIFEST).is_file())


def _finish(temporary: Path, final: Path, content: dict) -> None:
    """Checksums by all ranks, then the manifest, then the name."""
    if setup.is_first_rank():
        (temporary / "state.json").write_text(json.dumps(content))
    dist.barrier()
    names = sorted(path.name for path in temporary.iterdir())[dist.get_rank() :: dist.get_world_size()]
    mine = {name: ((temporary / name).stat().st_size, _sha256(temporary / name)) for name in names}
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    if setup.is_first_rank():
        manifest = temporary / _MANIFEST
        manifest.write_text(json.dumps({name: entry for part in parts for name, entry in part.items()}, indent=1))
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        if final.exists():
            shutil.rmtree(final)  # the same step saved again after a resume
        os.rename(temporary, final)
        _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _model_entries(state: TrainState):
    chunks = unwrap_model(state.chunks)
    return [("model" if len(chunks) == 1 else f"model{i}", chunk) for i, chunk in enumerate(chunks)]


def _sharded_state(state: TrainState, is_loading: bool) -> dict:
    metadata = ensure_metadata_has_dp_cp_group(dict(_METADATA))
    sharded = {name: model.sharded_state_dict(metadata=metadata) for name, model in _model_entries(state)}
    _make_adam_state(state.optimizer)
    sharded["optimizer"] = state.optimizer.sharded_state_dict(dict(sharded), is_loading=is_loading, metadata=metadata)
    return sharded


def _torch_adams(optimizer) -> list[torch.optim.AdamW]:
    return [part.optimizer for part in optimizer.chained_optimizers if isinstance(part.optimizer, torch.optim.AdamW)]


def _make_adam_state(optimizer) -> None:
    """Core expects the state that torch's AdamW makes at its first step."""
    for adam in _torch_adams(optimizer):
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            if not adam.state[parameter]:
                adam.state[parameter].update(
                    step=torch.tensor(0.0), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
                )


def _adam_step(optimizer) -> float:
    return next((float(entry["step"]) for adam in _torch_adams(optimizer) for entry in adam.state.values()), 0.0)


def _pop_adam_steps(optimizer) -> list[dict]:
    """The state entries, without `step`, which Core (0.19) would look for among the saved tensors."""
    entries = [entry for adam in _torch_adams(optimizer) for entry in adam.state.values()]
    for entry in entries:
        entry.pop("step")
    return entries
