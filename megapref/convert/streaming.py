"""Writes a model's safetensors files tensor by tensor. safetensors' own writer wants all tensors of a file at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_files(folder: Path, entries: list[Entry], tensors: Iterable[Tensor], max_file_bytes: int) -> None:
    """Writes the tensors, as many and in the order of the entries, to files of at most `max_file_bytes`, or of one larger tensor."""
    files = _split(entries, max_file_bytes)
    names = ["model.safetensors"] if len(files) == 1 else [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    remaining = iter(tensors)
    for name, members in zip(names, files, strict=True):
        _write_file(folder / name, members, remaining)
    if len(files) > 1:
        weight_map = {entry.name: name for name, members in zip(names, files, strict=True) for entry in members}
        index = {"metadata": {"total_size": sum(entry.num_bytes for entry in entries)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _split(entries: list[Entry], max_file_bytes: int) -> list[list[Entry]]:
    files: list[list[Entry]] = [[]]
    for entry in entries:
        if files[-1] and sum(e.num_bytes for e in files[-1]) + entry.num_bytes > max_file_bytes:
            files.append([])
        files[-1].append(entry)
    return files


def _write_file(path: Path, entries: list[Entry], tensors: Iterator[Tensor]) -> None:
    """The format: the header's length in 8 bytes, the header as JSON padded to a multiple of 8, the tensors' bytes."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [end, end + entry.num_bytes]}
        end += entry.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = next(tensors)
            assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), entry.name
            file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
            del tensor  # before the next one is made
