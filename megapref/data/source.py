"""Reads a source as the config describes it: the rows of its file, their columns renamed, templates filled in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from string import Formatter
from typing import Any, Protocol

from megapref.data.conversations import show_keys
from megapref.data.rows import BadRow, Location, OnBad, read_rows, show


class SourceLike(Protocol):
    path: str
    split: str
    take: int | None
    weight: float | None
    columns: Mapping[str, str]
    template: Mapping[str, Any]
    filter_length: bool


def read_source(source: SourceLike, normalise: Callable[[dict[str, Any], Location], Any], on_bad: OnBad) -> Iterator[Any]:
    """`normalise(row, location)` of every row of a source in order; bad rows go to `on_bad`."""
    for row, location in read_rows(source.path, source.split, source.take, on_bad):
        try:
            result = normalise(reshape(row, source.columns, source.template, location), location)
        except BadRow as error:
            on_bad(error)
        else:
            yield result


def reshape(row: dict[str, Any], columns: Mapping[str, str], template: Mapping[str, Any], location: Location) -> dict[str, Any]:
    """The row with `columns` ({new name: name in the file}) renamed and the columns of `template` made from those it has in the file."""
    for new, old in columns.items():
        if old not in row:
            raise BadRow(location, f"{old}: expected the column, which columns.{new} names, the row has {show_keys(row)}")
    taken = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in taken}
    renamed = {new: row[old] for new, old in columns.items()}
    return kept | renamed | {key: _fill(value, row, f"template.{key}", location) for key, value in template.items()}


def check_template(template: Any) -> None:
    """ValueError where a text of the template, in whatever lists and mappings, is not one with {column}s in it."""
    if isinstance(template, str):
        for _, column, form, conversion in Formatter().parse(template):
            if column == "" or form or conversion:
                raise ValueError("expected the name of a column and nothing else between braces")
    elif isinstance(template, list | dict):
        for part in template.values() if isinstance(template, dict) else template:
            check_template(part)
    else:
        raise ValueError(f"expected text, or messages with role and content, got {show(template)}")


def check_any(usable: Sequence[Any], sources: Sequence[SourceLike], dropped: Sequence[BadRow]) -> None:
    """ValueError where no row of the sources is left, with the first reason."""
    if not usable:
        names = ", ".join(source.path for source in sources) or "no source is given"
        reason = f"; the first of {len(dropped)} dropped rows: {dropped[0]}" if dropped else ""
        raise ValueError(f"data: no usable row in {names}{reason}")


def _fill(template: Any, row: dict[str, Any], key: str, location: Location) -> Any:
    if isinstance(template, list):
        return [_fill(part, row, key, location) for part in template]
    if isinstance(template, dict):
        return {name: _fill(part, row, key, location) for name, part in template.items()}
    return "".join(text + _column(row, column, key, location) for text, column, _, _ in Formatter().parse(template))


def _column(row: dict[str, Any], column: str | None, key: str, location: Location) -> str:
    if column is None:
        return ""
    if row.get(column) is None:
        raise BadRow(location, f"{column}: expected the column, which {key} uses, the row has {show_keys(row)}")
    if not isinstance(row[column], str | int | float):
        raise BadRow(location, f"{column}: expected text or a number, which {key} uses, got {show(row[column])}")
    return str(row[column])
