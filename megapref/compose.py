"""Finds recipes and groups, and lays a command line's overrides over them: YAML files in, plain dicts and lists out.

The only user of Hydra and OmegaConf.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megapref.checks import ROOT
from megapref.plugins import did_you_mean

RECIPES = ROOT / "configs"


def search_path(config_dir: str | None = None) -> list[Path]:
    """Returns the directories that recipes and groups come from, the user's first."""
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ValueError(f"--config-dir {config_dir}: there is no such directory; give the one that holds your recipes")
    return [RECIPES] if config_dir is None else [Path(config_dir).resolve(), RECIPES]


def recipes(directories: list[Path]) -> dict[str, Path]:
    """Returns the recipes by name."""
    return {path.stem: path for directory in reversed(directories) for path in sorted(directory.glob("*.yaml"))}


def groups(directories: list[Path], cls: type) -> dict[str, list[str]]:
    """Returns the options of every config group that is a field of `cls`."""
    fields = {f.name for f in dataclasses.fields(cls)}
    files = [path for directory in directories for path in directory.glob("*/*.yaml") if path.parent.name in fields]
    return {group: sorted({p.stem for p in files if p.parent.name == group}) for group in sorted({p.parent.name for p in files})}


def compose_recipe(cls: type, config_name: str, overrides: list[str], directories: list[Path], errors: list[str]) -> dict[str, Any]:
    """Returns a recipe and overrides as plain containers. Overrides may name any key: who builds `cls` of it reports the unknown ones together."""
    names = recipes(directories)
    if config_name not in names:
        raise ValueError(f"--config-name {config_name}: no such recipe{did_you_mean(config_name, names)}; there are {', '.join(names)}")
    lines = _hydra_lines(overrides, groups(directories, cls), errors)
    home = names[config_name].parent
    for other in directories:
        errors += _hidden(home, other, config_name) if other != home else []
    return _compose(config_name, lines, [home, *(directory for directory in directories if directory != home)], errors)


def compose_settings(cls: type, overrides: list[str], directories: list[Path], errors: list[str]) -> dict[str, Any]:
    """Returns what the overrides say without a recipe, their groups' files filled in, as plain containers."""
    options_of = groups(directories, cls)
    lines = [f"+{line}" if line.partition("=")[0] in options_of else line for line in _hydra_lines(overrides, options_of, errors)]
    return _compose(None, lines, directories, errors)


def quoted(value: str) -> str:
    """Returns a text as an override writes it, whatever it holds."""
    return QuotedString(value, Quote.double).with_quotes()


def as_yaml(tree: dict[str, Any]) -> str:
    """Returns plain containers as YAML that a recipe may consist of."""
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def _compose(config_name: str | None, lines: list[str], directories: list[Path], errors: list[str]) -> dict[str, Any]:
    """What Hydra makes of a recipe in the first directory, or of nothing but the overrides, with the groups of all directories."""
    lines = [*lines, *(f"hydra.searchpath=[{json.dumps(f'file://{other}')}]" for other in directories[1:])]
    try:
        with initialize_config_dir(str(directories[0]), version_base=None):
            tree = compose(config_name, lines)
        if config_name and OmegaConf.is_dict(tree.get("run", OmegaConf.create())):
            tree = OmegaConf.merge({"run": {"dir": f"runs/{config_name}"}}, tree)  # interpolations may use it
        return OmegaConf.to_container(tree, resolve=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        where = f"--config-name {config_name}: " if config_name else ""
        raise ValueError("\n".join([*errors, f"{where}{_reason(error)}"])) from error


def _hydra_lines(overrides: list[str], options_of: dict[str, list[str]], errors: list[str]) -> list[str]:
    """The overrides that are right, as Hydra reads them; the others are added to `errors`."""
    lines = []
    for text in overrides:
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
        except HydraException as error:
            errors.append(f"{text}: not KEY=VALUE ({_reason(error)}); quote what holds special characters: 'key=\"a, b\"'")
            continue
        problem = _override_problem(override, options_of)
        errors += [problem] if problem else []
        lines += [] if problem else [_as_hydra_reads(override, options_of)]
    return lines


def _hidden(home: Path, other: Path, config_name: str) -> list[str]:
    """A recipe finds the groups of its own directory first: a user's file that a shipped one hides would silently have no effect."""
    files = sorted(path for path in other.glob("*/*.yaml") if home == RECIPES and (home / path.relative_to(other)).exists())
    return [f"{path}: the shipped recipe {config_name} would use the shipped option of this name; rename the file" for path in files]


def _override_problem(override: Override, options_of: dict[str, list[str]]) -> str | None:
    key = override.key_or_group
    if override.is_sweep_override():
        return f"{override.input_line}: several values for one run; write a list as {key}=[a,b] and quote a comma in text"
    if key.split(".")[0] == "hydra":
        return f"{override.input_line}: Hydra's own settings have no effect here; leave it out"
    value = override.value()
    if override.is_delete() or key not in options_of or not isinstance(value, str) or value in options_of[key]:
        return None
    return (
        f"{override.input_line}: no such option of {key}{did_you_mean(value, options_of[key])}; there are {', '.join(options_of[key])}; "
        f"single keys are set as {key}.KEY=VALUE"
    )


def _as_hydra_reads(override: Override, options_of: dict[str, list[str]]) -> str:
    key, value = override.key_or_group, override.value()
    if override.type is not OverrideType.CHANGE:
        return override.input_line
    if key not in options_of or isinstance(value, dict):
        return f"++{override.input_line}"  # also where the recipe leaves the key at its default
    return f"~{key}" if value is None else override.input_line


def _reason(error: Exception) -> str:
    return " ".join(f"{error} {error.__cause__ or ''}".split())
