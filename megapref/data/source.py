"""Reads a source as the config describes it: the rows of its file, their columns renamed, templates filled in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from string import Formatter
from typing import Any, Protocol

from megapref.data.conversations import show_keys
from megapref.data.rows import BadRow, Location, OnBad, read_rows, show


class Filtered(BadRow):
    """A row that `filter_length` leaves out."""

    remedy = "raise generation.max_new_tokens, or set filter_length: false for this source"


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


def check_filter(source: SourceLike, prompt_ids: Sequence[int], max_new_tokens: int | None, location: Location) -> None:
    """Raises Filtered for a prompt of over 0.9 * `max_new_tokens` tokens, in a source that filters."""
    if source.filter_length and max_new_tokens is not None and len(prompt_ids) > 0.9 * max_new_tokens:
        raise Filtered(location, f"prompt: {len(prompt_ids)} tokens, over 0.9 * generation.max_new_tokens={max_new_tokens}")


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
