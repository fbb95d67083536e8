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
    groups = {"train": {"steps": 8}, "save": {"every": 2, "export": True, "background": background}, "evaluation": {"every": 8}}
    errors: list[str] = []
    cfg = build(Config, options(inputs, Path("unused"), pairs, **groups), errors)
    assert not errors
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize(("pairs", "background", "processes"), [("offline", False, 1), ("offline", True, 2), ("online", True, 1)])
def test_kills_lose_nothing(inputs, tmp_path, pairs, background, processes):
    cfg = config(inputs, pairs, background)
    kills = chaos.torment(chaos.forked(cfg, processes), chaos.steps_between_saves(cfg), tmp_path, kills=17, seed=0)
    print(chaos.table(kills))
    assert len(kills) == 17


def record(step: int, **values) -> str:
    return json.dumps({"step": step, "loss": 0.5, "time/train": step, **values}) + "\n"


def test_what_is_lost_is_noticed(tmp_path):
    whole, run_dir = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, run_dir):
        (folder / "checkpoints").mkdir(parents=True)
        folder.with_suffix(".log").touch()
    (whole / "metrics.jsonl").write_text("".join(record(step) for step in range(9)))
    (run_dir / "metrics.jsonl").write_text("".join(record(step, **{"time/train": 0}) for step in range(4)) + '{"step": 4, "lo')
    (run_dir / "checkpoints" / "step_000002").mkdir()
    (run_dir / "checkpoints" / ".writing_step_000004").mkdir()

    def survived(place: str, save_every: int = 2):
        return chaos._survived(run_dir, whole, save_every, "one process", place, set())

    kill = survived("step 4, pairs > judging")
    assert kill == chaos.Kill("one process", "step 4, pairs > judging", True, 3, 2)
    assert str(kill) == "one process at step 4, pairs > judging, a checkpoint half written; 3 steps done, 2 saved"
    left_by_another = chaos._half_written(run_dir)
    assert not chaos._survived(run_dir, whole, 2, "one process", "step 4, training", left_by_another).writing
    assert "pairs > judging                                  1             1        1" in chaos.table([kill])
    with pytest.raises(RuntimeError, match="its metrics are not those"):
        chaos._compare(run_dir, whole)
    run_dir.with_suffix(".log").write_text("passing over checkpoint step_000004: a file is not what was saved")
    with pytest.raises(RuntimeError, match="a checkpoint was spoilt"):
        survived("step 4, saving")
    (run_dir / "metrics.jsonl").write_text("".join(record(step) for step in range(6)))
    with pytest.raises(RuntimeError, match="after step 5, its newest checkpoint is of step 2"):
        survived("step 6, training")
    (run_dir / "metrics.jsonl").write_text(record(0, loss=0.6))
    with pytest.raises(RuntimeError, match="its metrics are not those"):
        survived("step 1, training", save_every=9)
