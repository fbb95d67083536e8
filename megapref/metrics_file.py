"""The file metrics.jsonl of a run directory: one JSON object per step, steps rising; a non-finite number is null."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from megapref.samples import json_value


def append(path: Path, step: int, metrics: dict[str, Any]) -> None:
    """Adds a step's record. OSError where it cannot be written; the file is then as it was, as far as that can be had."""
    line = json.dumps({"step": step} | {key: json_value(value) for key, value in metrics.items()}) + "\n"
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(line)
    except OSError:
        with suppress(OSError):
            os.truncate(path, size)  # a full disk may have taken half of the line
        raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, less a last line without newline (of a run at work, or killed); ValueError names a broken line."""
    records = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}): {line.strip()[:80]!r}; repair or delete the line") from None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            rule = "needs a JSON object with an integer `step`"
            raise ValueError(f"{path}, line {number}: {rule}, found {line.strip()[:80]!r}; repair or delete the line")
        records.append(record)
    return records


def cut_after(path: Path, step: int) -> list[dict[str, Any]]:
    """The records up to `step`, all that the file holds afterwards; it is replaced whole, so a kill leaves the old or the new one."""
    if not path.exists():
        return []
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return kept
