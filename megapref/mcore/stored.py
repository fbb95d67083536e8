"""The tensors of Core's distributed checkpoints, read and written one at a time by one process, without process groups.

A tensor is stored whole, whatever the layout that saved it: layers, and experts, are leading dimensions of one tensor each.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner, FileSystemReader, FileSystemWriter, save
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view
from torch.futures import Future

from megapref.mcore.layers import NORMS_IN_LINEAR


@dataclass(frozen=True)
class Piece:
    """What is written at once: the tensor of one layer, or of one expert of it. `key` is Core's name; `place` and `places` count layer and expert."""

    key: str
    place: tuple[int, ...]
    places: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def offsets(self) -> torch.Size:
        return torch.Size((*self.place, *(0 for _ in self.shape)))


def stored_name(name: str) -> str:
    """Core's name in a checkpoint of a parameter that ModelSpec.weights has as `name`: a layer's norms go by the product that follows."""
    name = name.replace("layers.{layer}.", "layers.").replace("experts.local_experts.{expert}.", "experts.experts.")
    for norm, in_linear in NORMS_IN_LINEAR.items():
        name = name.replace(norm, in_linear)
    return name


def write(folder: Path, pieces: list[Piece], tensor_of: Callable[[Piece], Tensor]) -> None:
    """Writes a checkpoint's files into an empty folder; `tensor_of` is asked for one piece at a time. OSError when they cannot be written."""
    try:
        save({}, storage_writer=_Writer(folder), planner=_Planner(pieces, tensor_of), no_dist=True)
    except CheckpointException as caught:  # a BaseException; its text has a traceback
        ((failure, _),) = caught.failures.values()
        raise (OSError(str(failure)) if isinstance(failure, RuntimeError) else failure) from caught  # torch.save raises a RuntimeError
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


class Stored:
    """A checkpoint's tensors. `tensors` maps Core's names to shape and type. ValueError when the list of them cannot be read."""

    def __init__(self, folder: Path):
        try:
            self.folder, self.metadata = folder, FileSystemReader(folder).read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / '.metadata'} cannot be read: {type(error).__name__}: {error}") from error
        entries = {key: entry for key, entry in self.metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)}
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            key: (tuple(entry.size), entry.properties.dtype) for key, entry in entries.items()
        }

    def read(self, key: str, place: tuple[int, ...] = (), rows: int | None = None) -> Tensor:
        """The tensor, or that of the layer and expert at `place`; its first `rows` only, where given."""
        shape, dtype = self.tensors[key]
        sizes = list(shape[len(place) :])
        if rows is not None:
            sizes[0] = rows
        wanted = ChunkStorageMetadata(torch.Size((*place, *(0 for _ in sizes))), torch.Size([1] * len(place) + sizes))
        items = create_read_items_for_chunk_list(key, self.metadata.state_dict_metadata[key], [wanted])
        if len(items) == 1:
            return self._part(items[0]).view(sizes)
        whole = torch.empty(wanted.sizes, dtype=dtype)
        for item in items:
            _narrow(whole, item.dest_offsets, item.lengths).copy_(self._part(item))
        return whole.view(sizes)

    def _part(self, item: ReadItem) -> Tensor:
        """What a file has of a tensor. torch's own reader would want a tensor to copy it to."""
        where = self.metadata.storage_data[item.storage_index]
        with (self.folder / where.relative_path).open("rb") as file:
            stored = torch.load(_create_file_view(file, where.offset, where.length), map_location="cpu", weights_only=True)
        return _narrow(stored, item.storage_offsets, item.lengths)


def _narrow(tensor: Tensor, offsets: torch.Size, lengths: torch.Size) -> Tensor:
    return tensor[tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))]


class _Writer(FileSystemWriter):
    """Writes one file, piece by piece. torch's own holds a piece of every name until the file is complete, and on a GPU machine reads ahead."""

    def write_data(self, plan: SavePlan, planner: _Planner) -> Future[list[WriteResult]]:
        written: Future[list[WriteResult]] = Future()
        name = f"{plan.storage_data.prefix}0.distcp"
        with (Path(self.path) / name).open("wb") as file:
            written.set_result([_write_item(file, name, item, planner) for item in plan.items])
        return written


def _write_item(file: BinaryIO, name: str, item: WriteItem, planner: _Planner) -> WriteResult:
    start, data = file.tell(), planner.resolve_data(item)
    if isinstance(data, io.BytesIO):
        file.write(data.getbuffer())
    else:  # torch would write all that a part of a tensor is a part of
        torch.save(data if data.untyped_storage().nbytes() == data.nbytes else data.clone(), file)
    num_bytes = file.tell() - start
    return WriteResult(item.index, num_bytes, _StorageInfo(name, start, num_bytes))


class _Planner(DefaultSavePlanner):
    """Writes pieces that are made when it is their turn, and the bytes that Core asks for besides: states of layers, of which there are none."""

    def __init__(self, pieces: list[Piece], tensor_of: Callable[[Piece], Tensor]):
        super().__init__()
        self.pieces = {MetadataIndex(piece.key, piece.offsets): piece for piece in pieces}
        self.tensor_of = tensor_of

    def create_local_plan(self) -> SavePlan:
        items = [_item(index, piece) for index, piece in self.pieces.items()]
        states = [_state_name(piece) for piece in self.pieces.values() if ".linear_" in piece.key and piece.key.endswith(".weight")]
        items += [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in (*states, "common_state/shard_0_1")]
        self.plan = SavePlan(items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Any]:
        self.global_plan, self.metadata = create_default_global_save_plan(all_plans)
        return self.global_plan, self.metadata

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            content = io.BytesIO()
            torch.save([{} if write_item.index.fqn.startswith("common_state") else None], content)
            return content
        piece = self.pieces[write_item.index]
        return self.tensor_of(piece).view([1] * len(piece.place) + list(piece.shape))


def _item(index: MetadataIndex, piece: Piece) -> WriteItem:
    chunk = ChunkStorageMetadata(piece.offsets, torch.Size((*(1 for _ in piece.place), *piece.shape)))
    whole = torch.Size((*piece.places, *piece.shape))
    return WriteItem(index, WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, TensorProperties(piece.dtype), whole))


def _state_name(piece: Piece) -> str:
    place, places = (".".join(map(str, numbers)) for numbers in (piece.place, piece.places))
    return f"{piece.key.removesuffix('weight')}_extra_state/shard_{place}_{places}"
