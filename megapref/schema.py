"""What a tree of dataclasses says of its keys: `build` turns plain containers into it and lists what is wrong, `options` describes every key.

The rule for a single value is its annotation, its help text the comment on its line, `MISSING` as its default says that it has to be given.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from megapref.plugins import choices, describe, did_you_mean, fit, show

MISSING = "???"


class Option(NamedTuple):
    """One key of the config. `<name>` stands for a name of the user's, `[]` for a place in a list."""

    key: str
    hint: Any
    default: Any  # MISSING where a value has to be given
    comment: str


def build(cls: type, tree: dict[str, Any], errors: list[str]) -> Any:
    """Returns `cls` filled from nested dicts and lists; unknown keys, missing and misfitting values are added to `errors`, each on a line.

    Only what leaves `errors` empty is whole.
    """
    return _build(cls, tree, "", errors, [option.key for option in options(cls)])


def options(cls: type, prefix: str = "") -> Iterator[Option]:
    """Yields every key of a dataclass and of those in it, in their order."""
    hints = get_type_hints(cls, include_extras=True)
    for f in dataclasses.fields(cls):
        hint, key = hints[f.name], f"{prefix}{f.name}"
        if not dataclasses.is_dataclass(hint):
            yield Option(key, hint, _default(f), _comments(cls).get(f.name, ""))
        mark = {list: "[]", dict: ".<name>"}.get(get_origin(hint), "")
        for part in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from options(part, f"{key}{mark}.")


def _build(hint: Any, value: Any, key: str, errors: list[str], keys: list[str]) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(hint, value, key, errors, keys)
    if origin is types.UnionType and dataclasses.is_dataclass(args[0]):
        return None if value is None else _build(args[0], value, key, errors, keys)
    if origin is list and dataclasses.is_dataclass(args[0]) and isinstance(value, list):
        return [_build(args[0], item, f"{key}[{i}]", errors, keys) for i, item in enumerate(value)]
    if origin is dict and dataclasses.is_dataclass(args[1]) and isinstance(value, dict):
        return {name: _build(args[1], item, f"{key}.{name}", errors, keys) for name, item in value.items()}
    try:
        return fit(value, hint)
    except TypeError:
        errors.append(f"{key}={show(value)} must be {describe(hint)}{did_you_mean(value, choices(hint))}")
        return value


def _build_dataclass(cls: type, value: Any, key: str, errors: list[str], keys: list[str]) -> Any:
    hints = get_type_hints(cls, include_extras=True)
    if not isinstance(value, dict):
        errors.append(f"{key}={show(value)} must be a mapping with {', '.join(hints)}; give {key}.{next(iter(hints))}=...")
        return value
    prefix = f"{key}." if key else ""
    siblings = [f"{prefix}{name}" for name in hints]
    errors += [f"{prefix}{name}: unknown key{_near_key(f'{prefix}{name}', siblings, keys)}" for name in value if name not in hints]
    built = {}
    for f in dataclasses.fields(cls):
        default = {} if dataclasses.is_dataclass(hints[f.name]) else _default(f)
        given = value.get(f.name, default)
        if given == MISSING:
            errors.append(f"{prefix}{f.name}: missing; give {prefix}{f.name}=... ({_comments(cls)[f.name]})")
        else:
            built[f.name] = _build(hints[f.name], given, f"{prefix}{f.name}", errors, keys)
    return cls(**built)


def _near_key(key: str, siblings: list[str], keys: list[str]) -> str:
    same_name = [other for other in keys if other.rpartition(".")[2] == key.rpartition(".")[2]]
    near = did_you_mean(key, siblings) or (f"; did you mean {same_name[0]}?" if same_name else did_you_mean(key, keys))
    return near or f"; there are {', '.join(siblings)}"


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


@cache
def _comments(cls: type) -> dict[str, str]:
    sources = [inspect.getsource(base) for base in reversed(cls.__mro__[:-1])]
    return {name: comment for source in sources for name, comment in re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE)}
