"""configs/loss has a file for every loss, with parameters that it takes."""

import inspect
from pathlib import Path

import pytest
import yaml

from megapref import losses
from megapref.plugins import load_plugin

FILES = sorted((Path(__file__).resolve().parents[2] / "configs" / "loss").glob("*.yaml"))


def listed(tree):
    """Every function and its parameters in a config, those of a weighted list too."""
    params = tree.get("params", {})
    members = params.get("losses", [])
    return [(tree["function"], params)] * (not members) + [entry for member in members for entry in listed(member)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_takes_its_parameters(path):
    for function, params in listed(yaml.safe_load(path.read_text())):
        load_plugin(function, params, "loss")


def test_every_loss_has_a_file():
    named = {yaml.safe_load(path.read_text())["function"] for path in FILES}
    public = {name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))}
    assert named == {f"losses:{name}" for name in public - {"aot_pair"}}
