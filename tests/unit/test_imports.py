"""Who may import whom: the packages stay apart, and what is Megatron-Core's or a device's is named in one package."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "megapref").rglob("*.py"))
ENTRIES = sorted(path for folder in ("launchers", "tools") for path in (ROOT / folder).rglob("*.py"))

# What each module, or each module of a package, may import of megapref; its own package always. The longest name counts.
MAY_IMPORT = {
    "batch": (),
    "plugins": (),
    "parallel": (),
    "display": (),
    "launch": (),
    "signals": (),
    "phases": (),
    "samples": (),
    "metrics_file": ("samples",),
    "runlog": ("display", "metrics_file", "samples"),
    "losses": ("batch",),
    "schema": ("plugins",),
    "checks": ("parallel", "plugins", "precision_checks", "sampling_checks", "signals", "config"),  # config for annotations only
    "sampling_checks": ("config", "parallel"),  # for annotations only
    "precision": ("parallel",),
    "precision_checks": ("plugins", "config"),  # config for annotations only
    "compose": ("checks", "plugins"),
    "config": ("checks", "compose", "parallel", "precision", "schema"),
    "cluster": ("config", "plugins", "schema", "signals"),
    "slurm": ("cluster", "signals"),
    "data": ("batch",),
    "online": ("batch", "data", "inference", "phases"),
    "inference": ("batch", "config", "mcore", "phases"),
    "mcore": ("batch", "config", "phases", "precision"),
    "convert": ("batch",),
    "convert.hf": ("batch", "config", "mcore", "phases"),
    "convert.refit": ("batch", "mcore"),
    "convert.core": ("batch", "mcore"),
    "convert.verify": ("batch", "config", "mcore"),
    "methods": ("batch", "config", "losses", "plugins", "schema"),
    "verdicts": ("batch", "config", "mcore", "online", "plugins", "phases"),
    "sources": ("batch", "config", "data", "inference", "mcore", "online", "verdicts"),
    "progress": ("config",),
    "saves": ("config", "mcore", "phases"),
    "engines": ("batch", "config", "convert", "mcore", "parallel"),
    "judge_model": ("batch", "config", "convert", "data", "mcore"),
    "opponent": ("batch", "config", "convert", "data", "mcore"),
    "caching": ("batch", "config", "data", "mcore", "sources"),
    "build": (
        "batch",
        "caching",
        "config",
        "convert",
        "data",
        "engines",
        "judge_model",
        "losses",
        "mcore",
        "methods",
        "opponent",
        "progress",
        "sources",
    ),
    "train": ("batch", "build", "config", "data", "losses", "mcore", "phases", "progress", "runlog", "saves", "signals"),
    "plan": ("batch", "data"),
    "planning": ("batch", "config", "convert", "data", "losses", "mcore", "methods", "online", "plan", "sources"),
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "megapref").with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Every module or name that a file imports, dotted."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def attributes(path: Path) -> set[str]:
    return {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_downwards_only(path):
    module = module_of(path)
    if path.name == "__init__.py":
        allowed = {module.removesuffix(".__init__")}
    else:
        own = max((name for name in MAY_IMPORT if within(module, name)), key=len, default=None)
        assert own is not None, f"megapref.{module} is in no rule of MAY_IMPORT: add one"
        allowed = {*MAY_IMPORT[own], module.split(".")[0] if "." in module else module}
    for name in imported(path):
        if within(name, "megapref"):
            assert any(within(name, f"megapref.{other}") for other in allowed), (
                f"megapref.{module} imports {name}; it may import {sorted(allowed)}"
            )


@pytest.mark.parametrize("path", [p for p in FILES if "mcore" not in p.parts], ids=module_of)
def test_core_processes_and_devices_only_in_mcore(path):
    names = imported(path) | attributes(path)
    for package in ("megatron.core", "torch.distributed"):
        assert not [name for name in names if within(name, package)], f"{path} uses {package}, which belongs in megapref/mcore/"
    assert "cuda" not in path.read_text(), f"{path} names cuda, which belongs in megapref/mcore/"


@pytest.mark.parametrize("path", FILES + ENTRIES, ids=str)
def test_one_reader_of_configs_and_no_megatron_training(path):
    names = imported(path)
    assert not [name for name in names if within(name, "megatron.training")]
    if path != ROOT / "megapref" / "compose.py":
        assert not [name for name in names if within(name, "omegaconf") or within(name, "hydra")]


def test_checks_imports_config_for_annotations_only():
    (block,) = [node for node in ast.parse((ROOT / "megapref" / "checks.py").read_text()).body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    assert [ast.unparse(node) for node in block.body] == ["from megapref.config import Config"]
