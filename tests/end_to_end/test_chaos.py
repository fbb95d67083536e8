"""tools/chaos.py: runs that are killed over and over lose nothing, and a loss would be noticed."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from tiny_runs import make_inputs, options

from megapref.config import Config
from megapref.schema import build

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
chaos = importlib.import_module("chaos")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def config(inputs, pairs: str, background: bool) -> Config:
    groups = {"train": {"steps": 12}, "save": {"every": 2, "export": True, "background": background}, "evaluation": {"every": 4}}
    errors: list[str] = []
    cfg = build(Config, options(inputs, Path("unused"), pairs, **groups), errors)
    assert not errors
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairs", "background", "processes"), [("offline", False, 1), ("offline", True, 2), ("online", True, 1), ("online", False, 2)]
)
def test_kills_lose_nothing(inputs, tmp_path, pairs, background, processes):
    kills = chaos.torment(config(inputs, pairs, background), tmp_path, processes, kills=13, seed=processes)
    print(chaos.table(kills))
    assert len(kills) == 13


def record(step: int, **values) -> str:
    return json.dumps({"step": step, "loss": 0.5, "time/train": step, **values}) + "\n"


def test_what_is_lost_is_noticed(inputs, tmp_path):
    cfg, whole, run_dir = config(inputs, "offline", False), tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, run_dir):
        (folder / "checkpoints").mkdir(parents=True)
    (whole / "metrics.jsonl").write_text("".join(record(step) for step in range(9)))
    (run_dir / "metrics.jsonl").write_text("".join(record(step, **{"time/train": 0}) for step in range(4)) + '{"step": 4, "lo')
    (run_dir / "checkpoints" / "step_000002").mkdir()
    kill = chaos._survived(cfg, run_dir, whole, "one process", "step 4, pairs > judging")
    assert kill == chaos.Kill("one process", "step 4, pairs > judging", 3, 2)
    assert "pairs > judging                                  1             1        1" in chaos.table([kill])
    with pytest.raises(RuntimeError, match="its metrics are not those"):
        chaos._compare(run_dir, whole)
    (run_dir / "metrics.jsonl").write_text("".join(record(step) for step in range(6)))
    with pytest.raises(RuntimeError, match="after step 5, its newest checkpoint is of step 2"):
        chaos._survived(cfg, run_dir, whole, "one process", "step 6, training")
    (run_dir / "metrics.jsonl").write_text(record(0, loss=0.6))
    with pytest.raises(RuntimeError, match="its metrics are not those"):
        chaos._survived(cfg, run_dir, whole, "one process", "step 1, training")
