"""Answers of a judge on disk, found again by what was asked: what was paid for once is not paid for again.

A folder has JSON lines {"key", "text"}. Every process appends to a file of its own, line by line, so any number may write at a time, and one that is
killed leaves at most its last line torn, which is passed over. Answers of other processes are seen when the folder is opened.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4


class AnswerCache:
    """The answers in `folder`, and a place for new ones; without a folder nothing is kept. ValueError for a file that holds something else."""

    def __init__(self, folder: Path | None):
        self.texts: dict[str, str] = {}
        self._path = folder and folder / f"answers-{uuid4().hex}.jsonl"
        for path in sorted(folder.glob("answers-*.jsonl")) if folder else ():
            self.texts |= _read(path)

    def add(self, key: str, text: str) -> None:
        """Keeps an answer, on disk when this returns."""
        if self._path is None:
            return
        self.texts[key] = text
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "text": text}) + "\n")


@cache
def open_cache(folder: str) -> AnswerCache:
    """The cache of a folder, read once in the life of a process."""
    return AnswerCache(Path(folder))


def key_of(request: dict[str, Any]) -> str:
    """A digest of everything that is sent."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:32]


def _read(path: Path) -> dict[str, str]:
    texts = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(keepends=True), 1):
        if line.endswith("\n"):
            try:
                entry = json.loads(line)
                texts[entry["key"]] = entry["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: line {number} is not a judge's answer ({error!r}); remove the file") from error
    return texts
