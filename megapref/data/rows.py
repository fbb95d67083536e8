"""Reads the rows of any supported file.

A row that cannot be used is a `BadRow`, which names file, row, key and what was expected; it goes to `on_bad`, which raises it or keeps it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Location:
    """Where a row is: file or hub name, and its number from 1 (of a JSON Lines file: the line)."""

    path: str
    row: int

    def __str__(self) -> str:
        return f"{self.path}, row {self.row}"


class BadRow(ValueError):
    """A row that cannot be used; the message names file, row, key and what was expected."""

    remedy = "repair the row, or set data.on_bad_row=skip"

    def __init__(self, location: Location, reason: str):
        super().__init__(f"{location}: {reason}; {self.remedy}")


OnBad = Callable[[BadRow], None]


def bad_row_handler(action: str, dropped: list[BadRow], key: str = "data.on_bad_row") -> OnBad:
    """What an option such as `data.on_bad_row` asks for: a function that raises the bad row (error) or appends it to `dropped` (skip)."""
    if action == "skip":
        return dropped.append
    if action != "error":
        raise ValueError(f"{key}={action!r} is not known; use error or skip")
    return raise_bad_row


def raise_bad_row(error: BadRow) -> None:
    """Raises it."""
    raise error


def read_rows(
    path: str, split: str = "train", take: int | None = None, on_bad: OnBad = raise_bad_row
) -> Iterator[tuple[dict[str, Any], Location]]:
    """The first `take` rows of a JSONL, JSON, CSV, Parquet or Arrow file, a folder of Parquet files, a saved data set, or a hub name, each located.

    Unreadable rows go to `on_bad`; a file that cannot be read at all is a ValueError.
    """
    if files := parquet_files(Path(path)):
        yield from islice(chain.from_iterable(read_rows(str(file), on_bad=on_bad) for file in files), take)
        return
    for number, row in islice(_open(path, split), take):
        location = Location(path, number)
        if isinstance(row, dict):
            yield row, location
        else:
            on_bad(BadRow(location, row.reason if isinstance(row, _Broken) else f"expected an object with named keys, got {show(row)}"))


@dataclass(frozen=True)
class _Broken:
    reason: str


def _open(path: str, split: str) -> Iterator[tuple[int, Any]]:
    file = Path(path)
    kind = file.suffix.lower().lstrip(".")
    known = {"jsonl": _jsonl, "json": _json, "csv": _csv, "parquet": _parquet, "arrow": _arrow}
    if file.is_file():
        if kind not in known:
            raise ValueError(f"data source {path}: cannot read a .{kind} file; use one of {', '.join('.' + k for k in known)}")
        return known[kind](file)
    if kind in known or (path.startswith(("/", "./", "../", "~")) and not file.is_dir()):
        raise ValueError(f"data source {path}: there is no such file (looked from {Path.cwd()}); correct the path")
    if file.is_dir() and not is_saved_data_set(file):
        raise ValueError(f"data source {path}: is a folder without Parquet files, nor saved with save_to_disk; name the file in it")
    return _hub(path, split)


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder, by name, those in folders below it not; none where it is something else, or a saved data set."""
    return sorted(folder.glob("*.parquet")) if folder.is_dir() and not is_saved_data_set(folder) else []


def is_saved_data_set(folder: Path) -> bool:
    """Whether `datasets` has saved one or several splits in the folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _parse_line(line)


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return _Broken(f"expected UTF-8, got byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return _Broken(f"expected a JSON object on one line, got invalid JSON ({error.msg.removesuffix(' at')} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of open brackets
        return _Broken(f"expected a JSON object on one line, got JSON that cannot be read ({error})")


def _json(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as start:
        is_array = start.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if not is_array:  # many .json files hold one object per line
        yield from _jsonl(file)
        return
    try:
        rows = json.loads(file.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data source {file}: expected a JSON list of objects in UTF-8 ({error}); repair the file") from error
    yield from enumerate(rows, 1)


def _csv(file: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        try:
            reader = csv.DictReader(lines, strict=True)
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise csv.Error(f"the header {show(names)} has a name twice")
            for number, row in enumerate(reader, 1):
                fits = None not in row and None not in row.values()
                yield number, row if fits else _Broken("expected as many fields as the header has")
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"data source {file}: expected CSV with a header line in UTF-8 ({error}); repair the file") from error


def _parquet(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        with pq.ParquetFile(file) as opened:
            yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in opened.iter_batches(1024)), 1)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"data source {file}: cannot be read as Parquet ({error}); repair the file") from error


def _arrow(file: Path) -> Iterator[tuple[int, Any]]:
    import datasets

    try:
        yield from enumerate(datasets.load_dataset("arrow", data_files=str(file), split="train", streaming=True), 1)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"data source {file}: cannot be read as Arrow ({error}); repair the file") from error


def _hub(path: str, split: str) -> Iterator[tuple[int, Any]]:
    import datasets

    try:
        if (Path(path) / "state.json").is_file():
            rows = datasets.load_from_disk(path)
        elif (Path(path) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(path)[split]
        else:
            rows = datasets.load_dataset(path, split=split, streaming=True)
        yield from enumerate(rows, 1)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"data source {path}, split {split}: neither a file here nor a data set that can be loaded ({error})") from error


def show(value: Any) -> str:
    """Type and value of what was got, on one line."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
