"""The documents say what is there: files, recipes, config keys, links; the worked example runs."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path

import pytest
import yaml

from megapref import compose, config
from megapref.methods import check_plugins
from megapref.plugins import show
from megapref.schema import options

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("megapref", "launchers", "tools", "docs", "configs", "tests")
BY_FOLDER = ("configs/", "tests/", "docs/benchmarks/")  # below these the tree may stop at a folder
SUFFIXES = (".py", ".yaml", ".sh", ".md")
OPTIONS = {option.key.replace("[]", ""): option for option in options(config.Config)}
SECTIONS = [f.name for f in dataclasses.fields(config.Config)]

per_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def section(text: str, heading: str) -> str:
    """What stands under a second-level heading."""
    return re.split(r"^## ", text.split(f"\n## {heading}\n")[1], flags=re.MULTILINE)[0]


def first_cells(text: str) -> list[list[str]]:
    """The cells of every table row whose first cell is code."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]


def tree() -> dict[str, str]:
    """Path (folders end with a slash) to comment, of every line of the README's tree."""
    block = re.search(r"^```\n(megapref/.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)[1]
    paths, folders = {}, []
    for line in block.splitlines():
        entry, _, comment = line.partition("#")
        depth = (len(entry) - len(entry.lstrip())) // 2
        folders = [*folders[:depth], entry.strip()]
        paths["".join(folders)] = comment.strip()
    return paths


def test_tree_has_every_file_with_a_comment_and_no_other():
    listed = tree()
    assert [path for path in listed if not (ROOT / path).exists()] == [], "the README's tree has these, and they do not exist"
    assert [path for path, comment in listed.items() if not comment] == [], "without a comment"
    folders = tuple(path for path in listed if path.endswith("/") and path.startswith(BY_FOLDER))
    stops = tuple(folder for folder in folders if not any(path.startswith(folder) and path != folder for path in listed))
    files = [file for top in FOLDERS for file in (ROOT / top).rglob("*") if file.suffix in SUFFIXES and file.read_text().strip()]
    paths = sorted(file.relative_to(ROOT).as_posix() for file in files)
    assert [path for path in paths if path not in listed and not path.startswith(stops)] == [], "the README's tree lacks these files"


def test_no_two_test_files_have_one_name():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names), "pytest imports them by name: it would collect neither"


def test_every_recipe_is_in_the_table():
    rows = {row[0].strip("`") for row in first_cells(section(README.read_text(), "Recipes"))}
    assert rows == set(compose.recipes([compose.RECIPES]))


def test_key_table_has_the_defaults():
    for key, default, *_ in first_cells(section(README.read_text(), "Configuration")):
        option = OPTIONS[key.strip("`")]
        assert default.strip("`") == ("" if option.default == config.MISSING else show(option.default)), key


def is_known(key: str) -> bool:
    """Whether a dotted key is an option, a section, or inside a mapping of the user's names or parameters."""
    parts = re.sub(r"\[\d*\]", "", key).split(".")
    for known, option in OPTIONS.items():
        pattern = known.split(".")
        fits = all(want in (part, "<name>") for want, part in zip(pattern, parts, strict=False))
        if fits and (len(parts) <= len(pattern) or str(option.hint).startswith("dict[str, typing.Any]")):
            return True
    return False


def flattened(mapping: dict, prefix: str = ""):
    for name, value in mapping.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{name}.")


@per_document
def test_config_keys_exist(document):
    text = document.read_text()
    for key in re.findall(rf"(?<![\w./:-])((?:{'|'.join(SECTIONS)})(?:\[\d*\])?(?:\.(?:[a-z_]+|<name>|NAME)(?:\[\d*\])?)+)(?![\w(/:])", text):
        if not key.endswith((".py", ".yaml", ".json", ".jsonl", ".safetensors", ".md")):
            assert is_known(key), f"{document.name} names the key {key}"
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        for key in flattened({name: value for name, value in yaml.safe_load(block).items() if name != "defaults"}):
            assert is_known(key), f"a YAML block of {document.name} has the key {key}"


@per_document
def test_links_and_paths_resolve(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)}|assets)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_worked_example_runs(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "add_a_method.md").read_text()
    files = dict(re.findall(r"^`([\w/.]+)`:?\n\n```\w+\n(.*?)```", text, re.MULTILINE | re.DOTALL))
    assert set(files) == {"my_method.py", "recipes/my_online.yaml", "test_my_method.py"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        check_plugins(config.load("my_online", [], "recipes"))
        importlib.import_module("test_my_method").test_margin_dpo_is_its_formula()
    finally:
        for name in ("my_method", "test_my_method"):
            sys.modules.pop(name, None)
