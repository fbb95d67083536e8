"""Functions named in a config as `module:name` with keyword arguments: `load_plugin` imports one and checks its arguments.

The function's keyword-only parameters are the schema. `fit` and `describe` say what an annotation admits; the config uses them too.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import json
import operator
import os
import sys
import types
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def load_plugin(function: str, params: dict[str, Any], key: str) -> Callable[..., Any]:
    """Returns the function at `module:name` with `params` bound; modules of megapref need no `megapref.` in front.

    `key` is the dotted config key, for messages. ValueError where the module, the name or a parameter is wrong; all wrong parameters are listed.
    """
    target, name = _find(function, f"{key}.function")
    signature = inspect.signature(target).parameters.values()
    schema = {p.name: p for p in signature if p.kind is inspect.Parameter.KEYWORD_ONLY}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature)
    hints = _hints(target)
    errors = []
    for param, value in params.items():
        if param not in schema:
            if not takes_any:
                errors.append(f"{key}.params.{param}={show(value)}: {name} has no such parameter{did_you_mean(param, schema)}")
            continue
        hint = hints.get(param, Any)
        try:
            fit(value, hint)
        except TypeError:
            errors.append(f"{key}.params.{param}={show(value)} must be {describe(hint)}{did_you_mean(value, choices(hint))}")
    for param, parameter in schema.items():
        if parameter.default is inspect.Parameter.empty and param not in params:
            errors.append(f"{key}.params.{param}: missing; give {key}.params.{param}=... ({describe(hints.get(param, Any))})")
    if errors:
        takes = "; ".join(f"{p.name}: {describe(hints.get(p.name, Any))}{_default(p)}" for p in schema.values()) or "no parameters"
        raise ValueError("\n".join([*errors, f"{name} takes {takes}."]))
    return partial(target, **params)


def params_by_epoch(function: str, params: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The parameters of epoch 0, 1, ...: where the function takes a number, a list gives its value in each epoch, the last one for good."""
    hints = _hints(_find(function, f"{key}.function")[0])
    listed = {name for name, value in params.items() if isinstance(value, list) and value and _fits(value[0], hints.get(name, Any), value)}
    epochs = max((len(params[name]) for name in listed), default=1)
    return [{name: value[min(epoch, len(value) - 1)] if name in listed else value for name, value in params.items()} for epoch in range(epochs)]


def _fits(item: Any, hint: Any, whole: list) -> bool:
    """Whether an item of a list is what the annotation asks for, and the list itself is not."""
    try:
        fit(whole, hint)
        return False
    except TypeError:
        pass
    try:
        fit(item, hint)
    except TypeError:
        return False
    return True


def _find(function: str, key: str) -> tuple[Callable[..., Any], str]:
    module_name, _, name = function.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")) or not name.isidentifier():
        raise ValueError(f"{key}={show(function)} must be module:name, such as losses:dpo or my_module:my_function")
    if os.getcwd() not in sys.path:  # a user's own file beside the run
        sys.path.append(os.getcwd())
    found = next((m for m in (f"megapref.{module_name}", module_name) if _exists(m, key, function)), None)
    if found is None:
        raise ValueError(
            f"{key}={show(function)}: there is no module {module_name} in megapref, in the current directory or among the installed packages; "
            "check the spelling, or run from the directory that holds the file"
        )
    try:
        module = importlib.import_module(found)
    except (ImportError, SyntaxError) as error:
        raise ValueError(
            f"{key}={show(function)}: importing {found} failed with {type(error).__name__}: {error}; repair the module"
        ) from error
    target = getattr(module, name, None)
    if not callable(target):
        own = [n for n, v in vars(module).items() if inspect.isfunction(v) and f"{v.__module__}.".startswith(f"{found}.") and n[0] != "_"]
        reason = "is not a function" if hasattr(module, name) else "does not exist"
        raise ValueError(
            f"{key}={show(function)}: {found}:{name} {reason}; {found} has {', '.join(own) or 'no functions'}{did_you_mean(name, own)}"
        )
    return target, f"{found}:{name}"


def _exists(module: str, key: str, function: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            return False
        raise ValueError(f"{key}={show(function)}: importing the package of {module} failed: {error}; repair the module") from error


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(target, include_extras=True)
    except NameError:  # an annotation names what is imported for type checkers only: nothing to check values against
        return {}


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is inspect.Parameter.empty else f" = {show(parameter.default)}"


def fit(value: Any, hint: Any) -> Any:
    """Returns `value` as the annotation has it (an int becomes a float, a list a tuple); TypeError where it does not fit.

    `Annotated[float, ">= 0", "< 1"]` bounds a number. Annotations other than the plain types of a config are isinstance checks.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        fitted = fit(value, args[0])
        if all(COMPARISONS[rule.split()[0]](fitted, float(rule.split()[1])) for rule in args[1:]):
            return fitted
    elif origin in (Union, types.UnionType):
        for option in args:
            try:
                return fit(value, option)
            except TypeError:
                continue
    elif origin is Literal:
        if any(value == allowed and type(value) is type(allowed) for allowed in args):
            return value
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif hint is int and type(value) is int:
        return value
    elif origin is list and isinstance(value, list):
        return [fit(item, args[0]) for item in value]
    elif origin is tuple and isinstance(value, list | tuple):
        items = [args[0]] * len(value) if args[1:] == (...,) else list(args)
        if len(items) == len(value):
            return tuple(fit(item, of) for item, of in zip(value, items, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {fit(k, args[0]): fit(v, args[1]) for k, v in value.items()}
    elif hint is None or hint is type(None):
        if value is None:
            return value
    elif hint not in (int, float) and isinstance(hint if origin is None else origin, type) and isinstance(value, origin or hint):
        return value
    raise TypeError(f"{show(value)} is not {describe(hint)}")


def describe(hint: Any) -> str:
    """Returns the annotation in words: `int >= 1`, `one of online, offline`, `list of float`, `str or null`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join([describe(args[0]), " and ".join(args[1:])])
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in args)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is list:
        return f"list of {describe(args[0])}"
    if origin is tuple:
        return f"list [{', '.join('...' if item is ... else describe(item) for item in args)}]"
    if origin is dict:
        return f"mapping of names to {describe(args[1])}"
    if hint is None or hint is type(None):
        return "null"
    return {Any: "anything", bool: "true or false"}.get(hint, getattr(hint, "__name__", str(hint)))


def choices(hint: Any) -> list[Any]:
    """Returns the values that an annotation lists one by one, of all its alternatives."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [value for part in get_args(hint) for value in choices(part)] if get_origin(hint) in (Annotated, Union, types.UnionType) else []


def show(value: Any) -> str:
    """Returns a value as a config writes it, cut to a line."""
    text = json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."


def did_you_mean(value: Any, candidates: Iterable[Any]) -> str:
    """Returns `; did you mean x?` for the nearest candidate, or nothing."""
    near = difflib.get_close_matches(str(value), [str(c) for c in candidates], n=1)
    return f"; did you mean {near[0]}?" if near else ""
