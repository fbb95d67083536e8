"""Functions named in a config: found, checked against their keyword-only parameters, bound."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapref.plugins import choices, describe, did_you_mean, fit, load_plugin, show

MODULE = """
from __future__ import annotations
from typing import TYPE_CHECKING, Annotated, Literal
if TYPE_CHECKING:
    from nowhere import Thing

NUMBER = 3

def score(prompts, completions, *, target: int, weight: float = 1.0, kind: Literal["mean", "sum"] = "mean", words: list[str] | None = None):
    return target * weight

def bounded(x, *, beta: Annotated[float, "> 0"] | list[Annotated[float, "> 0"]] = 0.1):
    return beta

def open_ended(x, **anything):
    return anything

def unresolvable(x: Thing, *, size: int = 1):
    return size
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Name of a module that lies in the current directory."""
    name = f"user_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / "imports_missing.py").write_text("import no_such_dependency\n")
    (tmp_path / "broken_syntax.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def error_of(function, params, key="reward.mine"):
    with pytest.raises(ValueError) as error:
        load_plugin(function, params, key)
    return str(error.value)


def test_binds_parameters_of_a_file_in_the_current_directory(module):
    assert load_plugin(f"{module}:score", {"target": 4, "weight": 2}, "reward.mine")([], []) == 8


def test_short_form_is_inside_megapref():
    from megapref import losses

    loss = load_plugin("losses:dpo", {"beta": 0.2}, "loss")
    assert loss.func is losses.dpo and loss.keywords == {"beta": 0.2}
    assert load_plugin("megapref.losses:dpo", {}, "loss").func is losses.dpo


def test_other_packages():
    assert load_plugin("os.path:join", {}, "judge")("a", "b") == "a/b"


@pytest.mark.parametrize("function", ["losses", "losses:", ":dpo", "a:b:c", "", "losses.dpo", "../losses:dpo"])
def test_not_module_and_name(function):
    message = error_of(function, {})
    assert f"reward.mine.function={show(function)} must be module:name" in message and "losses:dpo" in message


@pytest.mark.parametrize("function", ["no_such_module:f", "no_such.package.at_all:f", "losses.inner:f"])
def test_no_such_module(function):
    message = error_of(function, {})
    assert f'reward.mine.function="{function}"' in message and "there is no module" in message and "check the spelling" in message


def test_no_such_function_names_those_there_are():
    message = error_of("losses:dpoo", {}, "loss")
    assert 'loss.function="losses:dpoo"' in message and "ipo" in message and "did you mean dpo?" in message


def test_not_callable(module):
    message = error_of(f"{module}:NUMBER", {})
    assert "NUMBER is not a function" in message and "score" in message


@pytest.mark.parametrize(("name", "reason"), [("imports_missing", "no_such_dependency"), ("broken_syntax", "SyntaxError")])
def test_module_that_cannot_be_imported(module, name, reason):
    message = error_of(f"{name}:f", {})
    assert f'reward.mine.function="{name}:f"' in message and reason in message and "repair the module" in message


@pytest.mark.parametrize(
    ("params", "parts"),
    [
        ({"target": 1, "wieght": 2}, ["reward.mine.params.wieght=2", "no such parameter; did you mean weight?", "weight: float = 1.0"]),
        ({}, ["reward.mine.params.target: missing; give reward.mine.params.target=... (int)"]),
        ({"target": "many"}, ['reward.mine.params.target="many" must be int']),
        ({"target": True}, ["reward.mine.params.target=true must be int"]),
        ({"target": 1.5}, ["reward.mine.params.target=1.5 must be int"]),
        ({"target": 1, "weight": None}, ["reward.mine.params.weight=null must be float"]),
        ({"target": 1, "kind": "means"}, ['reward.mine.params.kind="means" must be one of mean, sum; did you mean mean?']),
        ({"target": 1, "words": "thanks"}, ['reward.mine.params.words="thanks" must be list of str or null']),
        ({"target": 1, "words": ["a", 2]}, ['reward.mine.params.words=["a", 2] must be list of str or null']),
        ({"target": 1, "prompts": []}, ["reward.mine.params.prompts=[]", "no such parameter"]),
    ],
)
def test_wrong_parameters(module, params, parts):
    message = error_of(f"{module}:score", params)
    assert all(part in message for part in [*parts, f"{module}:score takes target: int"]), message


def test_all_wrong_parameters_at_once(module):
    message = error_of(f"{module}:score", {"weight": "x", "unknown": 1})
    assert all(f"params.{name}" in message for name in ("weight", "unknown", "target"))


def test_bounds_and_alternatives(module):
    assert load_plugin(f"{module}:bounded", {"beta": [0.2, 1]}, "loss")(0) == [0.2, 1]
    for beta in (0, -1.0, [0.1, 0.0], "x", float("nan")):
        assert "must be float > 0 or list of float > 0" in error_of(f"{module}:bounded", {"beta": beta}, "loss")


def test_var_keyword_takes_anything(module):
    assert load_plugin(f"{module}:open_ended", {"a": 1}, "judge")(0) == {"a": 1}


def test_annotations_that_cannot_be_resolved_are_not_checked(module):
    assert load_plugin(f"{module}:unresolvable", {"size": 3}, "judge")(0) == 3
    assert "no such parameter" in error_of(f"{module}:unresolvable", {"sise": 3})


@pytest.mark.parametrize(
    ("value", "hint", "fitted"),
    [
        (1, float, 1.0),
        ([1, 0.5], tuple[float, float], (1.0, 0.5)),
        ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
        (None, int | None, None),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        (["a"], Sequence[str], ["a"]),
        ("x", Any, "x"),
        (0.5, Annotated[float, "> 0", "<= 1"], 0.5),
    ],
)
def test_fit(value, hint, fitted):
    result = fit(value, hint)
    assert result == fitted and type(result) is type(fitted)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, int),
        (True, float),
        ("1", float),
        (1, str),
        (1, bool),
        ([1.0], tuple[float, float]),
        ([1, 2], list[str]),
        ({"a": "b"}, dict[str, int]),
        (1, Literal[True]),
        (0, Annotated[int, ">= 1"]),
        (None, int),
        ("x", None),
    ],
)
def test_does_not_fit(value, hint):
    with pytest.raises(TypeError):
        fit(value, hint)


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_bounds_admit_exactly_the_interval(x):
    try:
        admitted = fit(x, Annotated[float, ">= 0", "< 1"]) == x
    except TypeError:
        admitted = False
    assert admitted == (0 <= x < 1)


def test_words():
    assert describe(Literal["a", "b"] | None) == "one of a, b or null"
    assert choices(Literal["a", "b"] | None) == ["a", "b"]
    assert did_you_mean("betta", ["beta", "alpha"]) == "; did you mean beta?" and did_you_mean("zzz", ["beta"]) == ""
    assert len(show("x" * 1000)) == 120


def test_imports_nothing_heavy():
    code = "import sys, megapref.plugins; sys.exit(bool({'torch', 'omegaconf', 'hydra'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
