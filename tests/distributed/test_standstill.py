"""Ranks that stop, hang or fail: the others end in time and name the one that is at fault, where it is and what it said."""

import os
import signal
import time

import pytest
from distributed_run import ends_of
from tiny_runs import make_inputs, metrics_of, options, run_training

STUCK, STEP = 86, 2
PLACES = {"generation": "pairs > generation", "judging": "pairs > judging", "training": "training", "saving": "saving"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def tree_of(inputs, run_dir, **groups):
    run = {"dir": str(run_dir), "seed": 3, "stuck_after": "10m"}
    return options(inputs, run_dir, "online", run=run, save={"every": 1, "export": False}, **groups)


def be_impatient() -> None:
    """From step 2 on 10 s stand for the 10 minutes: what a machine needs to load is not measured."""
    from megapref import train
    from megapref.mcore import setup

    real = train.phase

    def phase(name, step=None):
        if step == STEP:
            vars(setup._watches[0]).update(_stuck_after=10, _tick=0.5)
        return real(name, step)

    train.phase = phase


def train_and_do(tree: dict, place: str, rank: int, what: str) -> None:
    """Trains; in step 2 one rank stops, sleeps or raises at the given place."""
    import tiny_runs

    from megapref.mcore import generation, saving
    from megapref.mcore import step as mcore_step
    from megapref.phases import here

    where = {
        "generation": (generation._Sampler, "sample_kernel"),
        "judging": (tiny_runs, "letters"),
        "training": (mcore_step, "apply_gradients"),
        "saving": (saving, "_checksums"),
    }
    holder, name = where[place]
    real = getattr(holder, name)

    def trouble(*args, **kwargs):
        if here.step == STEP and "evaluation" not in here.within and os.environ["RANK"] == str(rank):
            match what:
                case "stops":
                    time.sleep(6)  # it has told where it is
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "sleeps":
                    time.sleep(1000)
                case "raises":
                    raise RuntimeError("I have had enough")
        elif what == "raises" and here.step == STEP and place == "generation":
            time.sleep(1000)  # in code of its own, it would not notice
        return real(*args, **kwargs)

    setattr(holder, name, trouble)
    if what != "raises":
        be_impatient()
    run_training(tree)


@pytest.mark.parametrize(
    ("place", "rank", "what"),
    [
        ("generation", 1, "stops"),
        ("judging", 1, "sleeps"),
        pytest.param("judging", 0, "stops", marks=pytest.mark.slow),
        pytest.param("training", 1, "stops", marks=pytest.mark.slow),
        pytest.param("saving", 1, "sleeps", marks=pytest.mark.slow),
    ],
)
def test_rank_that_stands_still_is_named_with_step_and_phase(inputs, tmp_path, place, rank, what):
    parallel = {"tensor": 2} if place == "saving" else {}  # copies of the model write nothing
    ends = ends_of(train_and_do, 2, tree_of(inputs, tmp_path / "run", parallel=parallel), place, rank, what, grace=2)
    other = 1 - rank
    stopped = -signal.SIGKILL if what == "stops" else STUCK
    assert [ends[rank][0], ends[other][0]] == [stopped, STUCK], ends
    told = ends[min(rank, other) if what == "sleeps" else other][1]
    assert "no rank has got on for 10m (run.stuck_after)" in told and "in run_training" in told
    assert f"rank {rank} holds up the run" in told
    if rank == 1:  # with rank 0 the place is gone where the ranks leave word
        (line,) = [line for line in told.splitlines() if line.startswith(">>>")]
        assert line.startswith(f">>> rank 1: {'does not answer; last seen at ' if what == 'stops' else ''}step {STEP}, {PLACES[place]}")
        assert f"rank 0: step {STEP}, " in told and "waits for other ranks in " in told
    if what == "sleeps":
        assert "time.sleep(1000)" in ends[rank][1]


def train_with_slow_judge(tree: dict) -> None:
    """Trains; on rank 1 the reward of step 2 takes longer than `stuck_after`, but gets on."""
    import tiny_runs

    from megapref.phases import here, moved

    real = tiny_runs.letters

    def slow(*args):
        for _ in range(30 if here.step == STEP and os.environ["RANK"] == "1" else 0):
            time.sleep(0.5)
            moved()
        return real(*args)

    tiny_runs.letters = slow
    be_impatient()
    run_training(tree)


@pytest.mark.slow
def test_rank_that_is_slow_but_gets_on_is_waited_for(inputs, tmp_path):
    tree = tree_of(inputs, tmp_path / "run", evaluation={"every": 0}, data={"validation": {}})
    assert [code for code, _ in ends_of(train_with_slow_judge, 2, tree)] == [0, 0]
    assert metrics_of(tmp_path / "run")[-1]["step"] == 3


@pytest.mark.parametrize("place", ["training", "generation"])
def test_rank_that_raises_ends_the_others_with_its_message(inputs, tmp_path, place):
    """In training the other notices by itself, and does not tell of the connection that it lost; while generating it is ended."""
    (code, told), (other_code, other_told) = ends_of(train_and_do, 2, tree_of(inputs, tmp_path / "run"), place, 1, "raises")
    assert (code, other_code) == (1, 1)
    assert "rank 0 ends, as rank 1 failed first, at step 2, " + PLACES[place] in told and "RuntimeError: I have had enough" in told
    assert "Traceback" not in told
    assert "Traceback" in other_told and "RuntimeError: I have had enough" in other_told and "rank 0" not in other_told
