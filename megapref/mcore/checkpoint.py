"""Checkpoints as they are found on disk: complete and verified, or passed over."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from megapref import phases
from megapref.mcore import cpu, setup
from megapref.mcore.sharded_state import METADATA, load_module, load_optimizer, model_entries, sharded_state, without_missing_scales
from megapref.mcore.step import TrainState

MANIFEST = "manifest.json"


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step_{step:06d}"


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder was made by a save."""
    return (folder / MANIFEST).is_file()


def load_checkpoint(state: TrainState, path: Path) -> dict:
    """Loads a checkpoint, saved at any layout, into `state` and returns its `extra`.

    ValueError when a file is missing or changed, or it is a converted model.
    """
    problem = verify(path)
    if problem:
        raise ValueError(f"checkpoint {path} is not usable: {problem}; run.resume takes the folder of one, such as checkpoints/step_000010")
    if not (path / "state.json").is_file():
        raise ValueError(f"{path} is a converted model, which has no state of a run to go on with; start a new one from it: model.path={path}")
    saved = json.loads((path / "state.json").read_text())
    if state.moving_reference and not saved["has_reference"]:
        raise ValueError(f"checkpoint {path} has no reference of its own, which reference.sync_steps needs; resume with reference.sync_steps=0")
    with cpu.core_calls():
        loaded = dist_checkpointing.load(without_missing_scales(sharded_state(state, is_loading=True), path), str(path))
        for name, model in model_entries(state.chunks):
            load_module(model, loaded[name])
        load_optimizer(state.optimizer, loaded["optimizer"], saved["adam_step"])
        if state.moving_reference:
            with state.moving_reference.in_place() as chunks:
                for name, chunk in model_entries(chunks):
                    load_module(chunk, loaded["reference"][name])
    state.step, state.bad_steps, state.log_ratios = saved["step"], saved["bad_steps"], tuple(saved["log_ratios"])
    return saved


def load_weights(chunks: list[torch.nn.Module], path: Path) -> None:
    """Loads a checkpoint's model, saved at any layout, into chunks that are not trained. ValueError when a file is missing or changed."""
    problem = verify(path)
    if problem:
        raise ValueError(f"checkpoint {path} is not usable: {problem}; choose another one")
    metadata = ensure_metadata_has_dp_cp_group(dict(METADATA))
    with cpu.core_calls():
        sharded = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in model_entries(chunks)}
        loaded = dist_checkpointing.load(without_missing_scales(sharded, path), str(path))
    for name, chunk in model_entries(chunks):
        load_module(chunk, loaded[name])


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all as they were written, None where there is none yet. Collective; unusable ones are named on stderr.

    ValueError when there are checkpoints, but none is usable.
    """
    paths = setup.gather_over_world(setup.on_first_rank(all_checkpoints)(folder))[0]
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
    return next(filter(None, setup.gather_over_world(find_problem(path, dist.get_rank(), dist.get_world_size()))), None)


def find_problem(path: Path, part: int = 0, num_parts: int = 1) -> str | None:
    """What is wrong with every n-th of a checkpoint's files, or None. Not collective."""
    try:
        entries = json.loads((path / MANIFEST).read_text())
        for name, (num_bytes, digest) in sorted(entries.items())[part::num_parts]:
            if (path / name).stat().st_size != num_bytes or sha256(path / name) != digest:
                return f"{name} is not what was saved"
    except (OSError, ValueError, AttributeError, TypeError) as caught:
        return f"{type(caught).__name__}: {caught}"
    return None


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Renames the checkpoints of later steps, which a resumed run does again, to `unused_step_<n>`; returns their new paths. Not collective."""
    renamed = []
    for path in all_checkpoints(folder):
        if int(path.name.removeprefix("step_")) > step:
            names = (folder / f"unused_{path.name}{f'_{i}' if i else ''}" for i in itertools.count())
            renamed.append(path.rename(next(name for name in names if not name.exists())))
    return renamed


def all_checkpoints(folder: Path) -> list[Path]:
    """All that have the name of a checkpoint, by step."""
    paths = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step_")))


def sha256(path: Path) -> str:
    phases.moved()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
