"""Writes checkpoints, at once or beside training.

A checkpoint is written into a folder with a temporary name; `manifest.json`, with the size and SHA-256 of every file, is written last, and only
then does the folder get its name `step_<n>`. A save that is killed, or fails, leaves the earlier checkpoints as they were.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megapref.mcore import cpu, setup
from megapref.mcore.checkpoint import MANIFEST, all_checkpoints, path_of, sha256
from megapref.mcore.sharded_state import METADATA, adam_step_of, sharded_state
from megapref.mcore.step import TrainState

# Core makes a queue in a process of its own for its writers' results, which a killed run would leave behind; our writer needs none.
filesystem_async._results_queue = queue.SimpleQueue()


class SaveError(ValueError):
    """A checkpoint could not be written, as all ranks know; earlier ones are as they were."""


@dataclass
class Saving:
    """A checkpoint of which everything is planned and copied, and this process's files are being written."""

    path: Path
    temporary: Path
    state: str  # state.json
    planned: _Planned
    results: list | None = None  # of this process's files
    checksums: dict[str, tuple[int, str]] | None = None
    error: Exception | None = None
    thread: threading.Thread | None = None

    def is_written(self) -> bool:
        """Whether this process's files are."""
        return self.thread is None or not self.thread.is_alive()


def begin_save(state: TrainState, folder: Path, extra: dict, in_background: bool = False) -> Saving:
    """Begins to write `folder/step_<n>` with model, optimizer and `extra` (JSON), with what they are now; `finish_save` makes it a checkpoint.

    Collective. `in_background` this process's files are written while training goes on, from a copy in CPU memory. SaveError as of `finish_save`.
    """
    path, temporary = path_of(folder, state.step), folder / f".writing_step_{state.step:06d}"
    content = {"step": state.step, "adam_step": adam_step_of(state.optimizer), "bad_steps": state.bad_steps, "log_ratios": state.log_ratios}
    content |= {"has_reference": state.moving_reference is not None, **extra}
    with _save_errors(path, temporary):
        setup.on_first_rank(_make_empty)(temporary)
        planned = _Planned()
        with cpu.core_calls():
            options = {"content_metadata": METADATA, "async_sharded_save": True, "async_strategy": "mcore"}
            dist_checkpointing.save(sharded_state(state, is_loading=False), str(temporary), planned, **options)
    saving = Saving(path, temporary, json.dumps(content), planned)
    buckets = [(file, key, (data, _in_memory(tensors, in_background))) for file, key, (data, tensors) in planned.writer.write_buckets]
    planned.writer.write_buckets = []  # what training frees need not be held
    if in_background:
        saving.thread = threading.Thread(target=_write, args=(saving, buckets), daemon=True)
        saving.thread.start()
    else:
        _write(saving, buckets)
    return saving


def finish_save(saving: Saving, keep: int, protected: Collection[int] = ()) -> Path:
    """Waits for every process's files, verifies and names the checkpoint, then removes all but the newest `keep` and the `protected` steps'.

    Collective. SaveError on every rank when any rank could not write; earlier checkpoints are untouched then.
    """
    if saving.thread:
        saving.thread.join()
    with _save_errors(saving.path, saving.temporary):
        setup.agree(saving.error)
        written = setup.gather_on_first_rank((saving.results, saving.checksums))
        setup.on_first_rank(_finish)(saving, written)
    if setup.is_first_rank():
        kept = {path_of(saving.path.parent, step) for step in protected}
        for old in [path for path in all_checkpoints(saving.path.parent)[:-keep] if path not in kept]:
            shutil.rmtree(old, ignore_errors=True)
    return saving.path


def finish_alone(folder: Path, path: Path) -> None:
    """Makes a folder whose files one process has written the checkpoint `path`."""
    files = sorted(folder.iterdir())
    _give_name(folder, path, _checksums(*files), files)


def _make_empty(folder: Path) -> None:
    for killed in folder.parent.glob(".writing_step_*"):
        shutil.rmtree(killed)
    folder.mkdir(parents=True)


@contextmanager
def _save_errors(path: Path, temporary: Path) -> Iterator[None]:
    """Turns errors that all ranks have agreed on into a SaveError; what was half written does not stay on a disk that may be full."""
    try:
        yield
    except ValueError as error:
        if setup.is_first_rank():
            shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(f"cannot write the checkpoint {path}: {error}; earlier ones are as they were; free space, or use another run.dir") from error


class _Planned(TorchDistSaveShardedStrategy):
    """Core's strategy up to what each process has to write. Core would go on in collectives that hang when the first rank cannot write."""

    def _get_save_and_finalize_callbacks(self, writer, planned, async_strategy):
        self.writer, self.metadata = writer, planned[1]
        return AsyncRequest(None, (), [])


def _in_memory(tensors: list[tuple], copied: bool) -> list[tuple]:
    """What to write, in CPU memory; `copied`, that is safe from what training does to it."""
    return [(item, tensor.to("cpu", copy=copied or tensor.device.type != "cpu")) for item, tensor in tensors]


def _write(saving: Saving, buckets: list) -> None:
    """Writes this process's files, and reads them again for their checksums. No collective, so that it may run beside training."""
    try:
        transforms, saving.results, saving.checksums = [saving.planned.writer.transforms], [], {}
        for number, bucket in enumerate(buckets):
            _, results = saving.planned.writer.write_preloaded_data(transforms, number, bucket, None, None, use_fsync=True)
            if isinstance(results, Exception):
                raise results
            saving.results += results
            saving.checksums |= _checksums(Path(bucket[0]))
    except Exception as error:  # whatever it is: it is raised on all ranks when they finish the save
        refusal = _os_error_in(error)
        saving.error = error if refusal is None else ValueError(f"rank {dist.get_rank()}: {refusal.strerror or refusal}")


def _os_error_in(error: BaseException | None) -> OSError | None:
    """What the file system said; torch's writer raises errors of its own when it was refused."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _checksums(*files: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 by name."""
    return {file.name: (file.stat().st_size, sha256(file)) for file in files}


def _finish(saving: Saving, written: list[tuple[list, dict]]) -> None:
    """Core's index of all processes' files and our state, then the manifest, then the name."""
    folder = saving.temporary
    saving.planned.writer.finish(saving.planned.metadata, [results for results, _ in written])
    save_config(CheckpointingConfig(saving.planned.backend, saving.planned.version), str(folder))
    (folder / "state.json").write_text(saving.state)
    ours = [folder / name for name in (".metadata", "metadata.json", "state.json")]
    sums = {name: entry for _, part in written for name, entry in part.items()} | _checksums(*ours)
    _give_name(folder, saving.path, sums, ours)


def _give_name(folder: Path, path: Path, sums: dict[str, tuple[int, str]], unsynced: Collection[Path]) -> None:
    """Makes a folder with a checkpoint's files the checkpoint `path`: the manifest with their checksums, then the name."""
    (folder / MANIFEST).write_text(json.dumps(sums, indent=1))
    for file in (*unsynced, folder / MANIFEST, folder):
        _sync(file)
    os.rename(folder, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
