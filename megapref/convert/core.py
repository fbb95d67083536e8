"""Hugging Face folders to Core's distributed checkpoints and back, in one process, one tensor at a time.

A converted folder is a model as a run takes it (`model.path`), at any layout: the checkpoint's files beside config.json and tokenizer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapref.batch import ModelSpec
from megapref.convert import mapping
from megapref.convert.families import read_spec
from megapref.convert.hf import MAX_FILE_BYTES, open_weights, put, tensor_files, write_companions
from megapref.convert.streaming import Entry, write_files
from megapref.mcore import checkpoint
from megapref.mcore.saving import finish_alone
from megapref.mcore.stored import Piece, Stored, stored_name, write


def hf_to_core(source: Path, folder: Path, dtype: str | None = None) -> None:
    """Writes the model of a Hugging Face folder as a distributed checkpoint, with its configuration and tokenizer.

    `dtype` (default: that of the source) names the type of the weights. Errors: ValueError when the folder exists or cannot be written, and for
    sources that are not supported.
    """
    spec = read_spec(source, classifier=True)
    try:
        files = tensor_files(source, spec)
        pieces = _pieces(files, spec, getattr(torch, dtype or spec.dtype))
    except (ValueError, OSError) as error:
        raise ValueError(f"{source}: {error}") from error

    def tensor_of(piece: Piece) -> Tensor:
        with _opened(files) as stored:
            return mapping.read_shard(*pieces[piece], piece.shape, spec, 1, 0, stored).to(piece.dtype)

    with _started(folder, sum(prod(piece.shape) * piece.dtype.itemsize for piece in pieces)) as partial:
        write(partial, list(pieces), tensor_of)
        write_companions(source, partial, dtype)
        finish_alone(partial, folder)


def _pieces(files: dict[str, Path], spec: ModelSpec, dtype: torch.dtype) -> dict[Piece, tuple[str, dict[str, int]]]:
    """What is written, and of which parameter it is."""
    pieces = {}
    for core_name, numbers in mapping.parameters(spec):
        with _opened(files) as stored:
            shapes = [tuple(stored(name.format(**numbers)).get_shape()) for name in spec.weights[core_name][1]]
        place, places = _place(numbers, spec)
        pieces[Piece(stored_name(core_name), place, places, (sum(part[0] for part in shapes), *shapes[0][1:]), dtype)] = (core_name, numbers)
    return pieces


def core_to_hf(source: Path, folder: Path, model: Path, dtype: str | None = None, max_file_bytes: int = MAX_FILE_BYTES) -> None:
    """Writes the model of a checkpoint, a run's or a converted one, as a Hugging Face folder with configuration and tokenizer of the folder `model`.

    Errors: ValueError when the folder exists or cannot be written, or the checkpoint is not of that model or not whole.
    """
    spec = read_spec(model, classifier=True)
    if problem := checkpoint.find_problem(source):
        raise ValueError(f"checkpoint {source} is not usable: {problem}; give the folder of one, such as checkpoints/step_000010")
    stored, to = Stored(source), getattr(torch, dtype or spec.dtype)
    entries: list[Entry] = []
    sources = []
    for core_name, numbers in mapping.parameters(spec):
        key, (place, places) = stored_name(core_name), _place(numbers, spec)
        shape = stored.tensors.get(key, ((), None))[0]
        if len(shape) <= len(places) or shape[: len(places)] != places:
            found = f"of shape {shape}" if shape else "none"
            raise ValueError(f"checkpoint {source} is of another model than {model}: of {key}, for {places} layers, it has {found}")
        rows = min(spec.vocab_size, shape[0]) if spec.weights[core_name][0] == "vocab" else None  # the rest are no words
        entries += [Entry(name, part, to) for name, part in mapping.hf_shapes(core_name, numbers, shape[len(place) :], spec)]
        sources.append((core_name, numbers, key, place, rows))
    with _started(folder, sum(entry.num_bytes for entry in entries)) as partial:
        write_companions(model, partial, dtype)
        write_files(partial, entries, _tensors(stored, sources, spec, to), max_file_bytes)
        put(partial, folder)


def _tensors(stored: Stored, sources: list[tuple], spec: ModelSpec, dtype: torch.dtype) -> Iterator[Tensor]:
    for core_name, numbers, key, place, rows in sources:
        made = mapping.hf_tensors(core_name, numbers, [stored.read(key, place, rows)], spec)
        while made:  # nothing is kept here of what is handed over
            yield made.pop(0)[1].to(dtype)


@contextmanager
def _opened(files: dict[str, Path]) -> Iterator[Callable[[str], Any]]:
    """Reads tensors by name. Closed for every parameter, as what has been read of an open file stays in this process' memory."""
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(open_weights(files[name])).get_slice(name)


def _place(numbers: dict[str, int], spec: ModelSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of layer and expert, and how many there are of each."""
    counts = {"layer": spec.transformer["num_layers"], "expert": spec.transformer.get("num_moe_experts", 0)}
    return tuple(numbers.values()), tuple(counts[name] for name in numbers)


@contextmanager
def _started(folder: Path, num_bytes: int) -> Iterator[Path]:
    """An empty folder for so many bytes of weights, which is to get its name when it is complete."""
    if folder.exists():
        raise ValueError(f"{folder} exists already; remove it or write to another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < num_bytes:
            raise ValueError(f"{folder} needs {num_bytes / 1e9:.3f} GB, {free / 1e9:.3f} GB are free; free space or write to another disk")
        yield partial
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
