"""What decides a run's course: the best checkpoints, early stopping, the guard, epochs, data that is read while training."""

import shutil
from pathlib import Path

import pytest
from distributed_run import run_distributed
from tiny_runs import make_inputs, metrics_of, options, run_training

METRIC = "validation-same_loss"
SAME = ("loss", "grad_norm", METRIC)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def train(inputs, tmp_path):
    """`train(name, ...)`: runs five steps into that directory; its metrics."""

    def run(name: str, world: int = 1, **groups) -> list[dict]:
        optimizer = {"schedule": "constant", "warmup_steps": 0, **groups.pop("optimizer", {})}
        groups = {"train": {"steps": 5, **groups.pop("train", {})}, "optimizer": optimizer, "evaluation": {"every": 1}, **groups}
        assert run_distributed(run_training, world, options(inputs, tmp_path / name, "offline", **groups)) == [""] * world
        return metrics_of(tmp_path / name)

    return run


def steps_of(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").iterdir())


def weights(run_dir: Path) -> bytes:
    return (run_dir / "hf" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("parallel", [{}, {"pipeline": 2}], ids=str)
def test_the_best_checkpoint_is_kept_and_exported(train, tmp_path, parallel):
    best = {"evaluation": {"every": 1, "metric": METRIC, "goal": "max"}, "save": {"keep": 1, "keep_best": 1, "export": True}, "parallel": parallel}
    world = parallel.get("pipeline", 1)
    records = train("best", world, **best)
    values = {record["step"]: record[METRIC] for record in records[1:]}
    step = max(values, key=values.get)
    assert step < 5 and steps_of(tmp_path / "best") == [step, 5]
    train("short", world, train={"steps": step}, save={"export": True}, parallel=parallel)
    assert weights(tmp_path / "best") == weights(tmp_path / "short")


def test_a_run_ends_when_nothing_gets_better_and_stays_ended(train, tmp_path):
    groups = {"evaluation": {"every": 1, "metric": METRIC, "goal": "max", "patience": 2}, "save": {"every": 2}}
    records = train("run", **groups)  # the loss falls, which this run takes for worse
    values = [record[METRIC] for record in records[1:]]
    assert values == sorted(values, reverse=True) and [record["step"] for record in records] == [0, 1, 2, 3]
    assert steps_of(tmp_path / "run") == [2, 3]
    assert train("run", **groups, run={"resume": "auto"}) == records


def test_the_guard_stops_a_run_or_trains_the_likelihood_too(train):
    guard, lowers_both = {"window": 1, "max_drop": 1e-6}, {"function": "losses:apo_down"}
    plain = train("plain", guard=guard, loss=lowers_both)
    falls = [record["logps/chosen"] < record["logps/ref_chosen"] for record in plain[1:]]
    first = 1 + falls.index(True)
    assert first < 5
    assert [record["step"] for record in train("stops", guard={**guard, "action": "stop"}, loss=lowers_both)] == list(range(first + 1))
    raised = train("raises", guard={**guard, "action": "raise_sft_weight"}, loss=lowers_both)
    assert "loss/sft" not in raised[first] and raised[first + 1]["loss/sft"] > 0
    assert raised[first + 1]["loss"] == pytest.approx(raised[first + 1]["loss/apo_down"] + raised[first + 1]["loss/sft"])


def test_evaluation_alone(train, tmp_path):
    """Of the first model, and of a checkpoint: what the run itself measured then, in a directory of its own."""
    records = train("run", save={"every": 2, "keep": 3})
    only = {"action": "evaluate"}
    (first,) = train("first", run=only)
    (second,) = train("second", run={**only, "resume": str(tmp_path / "run" / "checkpoints" / "step_000002")})
    for record, expected in ((first, records[0]), (second, records[2])):
        measured = [name for name in record if name.startswith("validation-")]
        assert METRIC in measured and record["step"] == expected["step"]
        assert all(record[name] == expected[name] for name in measured)
    assert not (tmp_path / "second" / "checkpoints").exists()


def test_epochs_take_the_place_of_steps(train):
    assert [record["step"] for record in train("run", train={"epochs": 1.5})] == [0, 1, 2, 3]  # 12 of the 8 rows, in batches of 5


def test_streamed_data(train, tmp_path):
    """At another number of ranks the same; resumed, too."""
    groups = {"data": {"streaming": True, "shuffle_buffer": 3}, "save": {"every": 2, "keep": 3}}
    whole = train("whole", **groups)
    assert [record["data/dropped_rows"] for record in whole[1:]] == [0.0] * 5
    shared = train("shared", 2, **groups)
    run_dir = Path(shutil.copytree(tmp_path / "whole", tmp_path / "resumed"))
    shutil.rmtree(run_dir / "checkpoints" / "step_000005")
    resumed = train("resumed", **groups, run={"resume": "auto"})
    for record, other, again in zip(whole, shared, resumed, strict=True):
        for name in [name for name in SAME if name in record]:
            assert other[name] == pytest.approx(record[name], rel=1e-5, abs=1e-6) and again[name] == record[name], (record["step"], name)
    assert len({record["loss"] for record in whole[1:]}) == 5
