"""Log-probabilities of a reference model on disk, found again by what was scored.

A folder has Parquet shards of rows (key, logps): `key` is a digest of the tokens of a pair and of which of them are trained, so it stands for
text, tokenizer, chat template and truncation; `logps` are those of its trained tokens, float32, the first side's before the second's. A shard is
written under a temporary name and gets the digest of its bytes as its name: it is whole or not there, any number of processes may write at a
time, and a changed byte shows. Nothing in it depends on the layout or the packing it was made with.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megapref.batch import TokenCompletion, TokenPair

DIGEST_BYTES = 16


def model_folder(cache: Path, model: Path, dtype: str) -> Path:
    """Where in the cache those of a model are: named by a digest of config.json, of every byte of its weights, and of the type it computes in."""
    digest = hashlib.sha256(dtype.encode())
    for path in [model / "config.json", *sorted(model.glob("*.safetensors"))]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return cache / digest.hexdigest()[: 2 * DIGEST_BYTES]


def key_of(row: TokenPair | TokenCompletion) -> bytes:
    """The digest of the tokens of a pair or a single completion, and of which are trained."""
    if isinstance(row, TokenPair):
        parts = (row.prompt_ids, row.first_ids, row.second_ids, row.first_mask, row.second_mask)
    else:
        parts = (row.prompt_ids, row.ids, (), row.mask, None)
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(np.array([-1] if part is None else [len(part), *part], dtype=np.int32).tobytes())
    return digest.digest()


def write_shard(folder: Path, logps: Mapping[bytes, Sequence[float]]) -> Path:
    """Writes log-probabilities by key as one new shard. OSError where the folder cannot be written."""
    values = [np.asarray(row, dtype=np.float32) for row in logps.values()]
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(values)))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"key": pa.array(list(logps), pa.binary(DIGEST_BYTES)), "logps": column}), sink, compression="none")
    content = sink.getvalue().to_pybytes()
    folder.mkdir(parents=True, exist_ok=True)
    return _put(folder / f"part-{_name_of(content)}.parquet", content)


def check_shards(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folder's shards that are as they were written, and those that are not: cut short, or with changed bytes."""
    good: list[Path] = []
    spoilt: list[Path] = []
    for path in sorted(folder.glob("part-*.parquet")):
        (good if path.stem == f"part-{_name_of(path.read_bytes())}" else spoilt).append(path)
    return good, spoilt


def read_shards(shards: Iterable[Path], wanted: Collection[bytes]) -> dict[bytes, array]:
    """The log-probabilities of the wanted keys that the shards have; one shard is in memory at a time."""
    found: dict[bytes, array] = {}
    for path in shards:
        table = pq.read_table(path, memory_map=True)
        column = table["logps"].combine_chunks()
        offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
        for key, begin, end in zip(table["key"].to_pylist(), offsets[:-1], offsets[1:], strict=True):
            if key in wanted:
                found[key] = array("f", values[begin:end].tobytes())
    return found


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Says in meta.json, for people, what the folder was first filled with; nothing reads it."""
    if not (folder / "meta.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _put(folder / "meta.json", (json.dumps(meta, indent=2) + "\n").encode())


def _name_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[: 2 * DIGEST_BYTES]


def _put(path: Path, content: bytes) -> Path:
    partial = path.with_name(f".{path.name}.{uuid4().hex}")
    partial.write_bytes(content)
    return partial.replace(path)
