"""Runs that are killed, spoilt, resumed and finished again: bit for bit the run that was left alone, and nothing lost on the way."""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from distributed_run import run_distributed, signals_of
from tiny_runs import make_inputs, metrics_of, numbers, options, run_training, write_recipe, write_rows

WORLDS = {"one process": (1, {}), "dp2": (2, {}), "tp2": (2, {"tensor": 2})}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole_run(inputs, tmp_path_factory):
    """`whole_run(pairs, world)`: the directory of a run of five steps that nothing disturbed, with checkpoints of steps 2, 4 and 5."""
    made = {}

    def run(pairs: str, world: str) -> Path:
        if (pairs, world) not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            size, parallel = WORLDS[world]
            tree = options(inputs, folder, pairs, parallel=parallel, train={"steps": 5}, save={"every": 2, "keep": 3, "export": True})
            assert run_distributed(run_training, size, tree) == [""] * size
            made[pairs, world] = folder
        return made[pairs, world]

    return run


def resume(inputs, run_dir: Path, pairs: str, world: str = "one process", path: Path | str = "auto", function=run_training, **groups) -> list[str]:
    size, parallel = WORLDS[world]
    groups = {"parallel": parallel, "train": {"steps": 5}, "save": {"every": 2, "keep": 3, "export": True}, **groups}
    groups["run"] = {"resume": str(path), **groups.get("run", {})}
    return run_distributed(function, size, options(inputs, run_dir, pairs, **groups))


def what_is_told(tree: dict) -> str:
    """What a run that succeeds writes to stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as told:
        assert run_training(tree) == ""
    return told.getvalue()


def same_as(run_dir: Path, whole: Path) -> None:
    assert numbers(run_dir) == numbers(whole)
    weights = [(folder / "hf" / "model.safetensors").read_bytes() for folder in (run_dir, whole)]
    assert weights[0] == weights[1]
    assert samples_in(run_dir) == samples_in(whole)


def samples_in(run_dir: Path) -> dict[str, bytes]:
    """What it has written of samples and their verdicts."""
    paths = [path for pattern in ("ledger/*.parquet", "samples/*", "completions.html") for path in run_dir.glob(pattern)]
    return {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in paths}


def at_step(whole: Path, copy: Path, step: int) -> Path:
    """A copy of a run as a kill right after the save of `step` leaves it."""
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("hf"))
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return copy


def train_until_killed(tree: dict, step: int, where: str) -> None:
    """Trains; the process kills itself in the given step, before the save or in its middle."""
    from megapref import saves
    from megapref.mcore import saving, setup

    def die(*args):
        if setup.is_first_rank():
            os.kill(os.getpid(), signal.SIGKILL)

    save, finish = saves.begin_save, saving._finish

    def save_or_die(state, *args, **options):
        saving._finish = die if (state.step, where) == (step, "during") else finish
        return die() if (state.step, where) == (step, "before") else save(state, *args, **options)

    saves.begin_save = save_or_die
    run_training(tree)


def train_until_killed_at(tree: dict, step: int, place: str) -> None:
    """Trains; the first rank kills itself at the given place of the step, the others end as they lose it."""
    _die_at(step, place)
    run_training(tree)


def _die_at(step: int, place: str) -> None:
    import tiny_runs

    from megapref.data import ledger
    from megapref.mcore import generation, saving
    from megapref.mcore import step as mcore_step
    from megapref.online import pairs

    where = {
        "generation": (generation._Sampler, "sample_kernel"),
        "judging": (tiny_runs, "letters"),
        "ledger": (ledger.pq, "write_table"),
        "training": (mcore_step, "apply_gradients"),
        "saving": (saving, "_finish"),
    }
    (holder, name), sample, calls = where[place], pairs.sample, []

    def sample_and_count(prompts, generate, models, numbers):
        calls.append(numbers[0])
        return sample(prompts, generate, models, numbers)

    real = getattr(holder, name)

    def die(*args, **kwargs):
        is_last = calls[-1:] == [step - 1] and os.environ["RANK"] == "0"
        result = None if is_last and place == "saving" else real(*args, **kwargs)  # what finishes a save makes it count
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    pairs.sample = sample_and_count
    setattr(holder, name, die)


PLACES = ("generation", "judging", "ledger", "training", "saving")


@pytest.mark.parametrize(("place", "world"), [*((place, "one process") for place in PLACES), ("judging", "dp2"), ("saving", "dp2")])
def test_kill_at_any_point_of_an_online_step(inputs, whole_run, tmp_path, place, world):
    whole, run_dir = whole_run("online", world), tmp_path / "run"
    tree = options(inputs, run_dir, "online", train={"steps": 5}, save={"every": 2, "keep": 3, "export": True})
    assert signals_of(train_until_killed_at, WORLDS[world][0], tree, 4, place)[0] == signal.SIGKILL
    has_ledger = place in ("training", "saving")
    assert (run_dir / "ledger" / "step_000004.parquet").exists() == has_ledger
    assert set(resume(inputs, run_dir, "online", world)) == {""}
    same_as(run_dir, whole)
    assert sorted(path.name for path in (run_dir / "ledger").rglob("step_000004*")) == ["step_000004.parquet"] * (2 if has_ledger else 1)
    assert not list((run_dir / "ledger").glob(".*"))


@pytest.mark.parametrize("world", ["one process", "dp2"])
@pytest.mark.parametrize("pairs", ["offline", "online"])
def test_resumed_run_equals_the_undisturbed_one(inputs, whole_run, tmp_path, pairs, world):
    whole = whole_run(pairs, world)
    run_dir = at_step(whole, tmp_path / "run", 2)
    assert set(resume(inputs, run_dir, pairs, world)) == {""}
    same_as(run_dir, whole)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_000002", "step_000004", "step_000005"]


@pytest.mark.parametrize("where", ["before", "during"])
def test_kill_at_a_save(inputs, whole_run, tmp_path, where):
    whole, run_dir = whole_run("offline", "dp2"), tmp_path / "run"
    tree = options(inputs, run_dir, "offline", train={"steps": 5}, save={"every": 2, "keep": 3, "export": True})
    with pytest.raises(RuntimeError):
        run_distributed(train_until_killed, 2, tree, 4, where)
    left = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert left == ({"step_000002", ".writing_step_000004"} if where == "during" else {"step_000002"})
    assert set(resume(inputs, run_dir, "offline", "dp2")) == {""}
    same_as(run_dir, whole)
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step_000002", "step_000004", "step_000005"}


def train_until_asked(tree: dict, who: int, step: int) -> bool:
    """Trains; one rank alone gets two signals in the given step, or its Slurm job's time limit is near."""
    from megapref import signals, train
    from megapref.config import Config
    from megapref.schema import build

    train_step, rank = train.train_step, int(os.environ["RANK"])

    def and_get_signals(state, *args):
        metrics = train_step(state, *args)
        for number in (signal.SIGUSR1, signal.SIGTERM) if (rank, state.step) == (who, step) else ():
            os.kill(os.getpid(), number)
        return metrics

    train.train_step = and_get_signals
    os.environ.update({"SLURM_JOB_ID": "1", "SLURM_JOB_END_TIME": "60"} if tree["save"].get("before_deadline") else {})
    try:
        with signals.noted():
            return train.main(build(Config, tree, []))
    finally:
        train.train_step = train_step
        for name in ("SLURM_JOB_ID", "SLURM_JOB_END_TIME"):
            os.environ.pop(name, None)


@pytest.mark.parametrize(
    ("who", "step", "reason", "save"),
    [(1, 3, "SIGUSR1 was received", {}), (None, 1, "the job's time limit is near", {"before_deadline": "1m"}), (0, 5, None, {})],
)
def test_asked_to_stop_it_saves_after_the_step_and_resumes_exactly(inputs, whole_run, tmp_path, who, step, reason, save):
    """On every rank, whichever was asked; in the last step it goes to its end."""
    whole, run_dir = whole_run("online", "dp2"), tmp_path / "run"
    tree = options(inputs, run_dir, "online", train={"steps": 5}, save={"every": 2, "keep": 3, "export": True, **save})
    assert run_distributed(train_until_asked, 2, tree, who, step) == [reason is not None] * 2
    if reason:
        assert json.loads((run_dir / "stopped.json").read_text()) == {"step": step, "reason": reason}
        assert metrics_of(run_dir)[-1]["step"] == step and (run_dir / "checkpoints" / f"step_{step:06d}").exists()
        assert set(resume(inputs, run_dir, "online", "dp2")) == {""}
    assert not (run_dir / "stopped.json").exists()
    same_as(run_dir, whole)


def exit_code_when_asked(recipe: list[str]) -> int:
    """Of launchers/train.py, which gets a signal in step 2."""
    from megapref import signals, train

    spec = importlib.util.spec_from_file_location("launch_training", Path(__file__).parents[2] / "launchers" / "train.py")
    launcher = importlib.util.module_from_spec(spec)
    sys.modules["launch_training"] = launcher
    spec.loader.exec_module(launcher)
    train_step = train.train_step

    def and_get_signal(state, *args):
        metrics = train_step(state, *args)
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    train.train_step = and_get_signal
    try:
        with signals.noted():
            return launcher.main(recipe)
    finally:
        train.train_step = train_step


def test_asked_to_stop_the_launched_process_ends_with_a_code_of_its_own(inputs, tmp_path):
    recipe = write_recipe(tmp_path / "recipe", options(inputs, tmp_path / "run", "offline"))
    assert run_distributed(exit_code_when_asked, 1, recipe) == [85]
    assert (tmp_path / "run" / "checkpoints" / "step_000002" / "manifest.json").exists()


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "manifest"])
def test_damaged_checkpoint_is_passed_over(inputs, whole_run, tmp_path, damage):
    whole = whole_run("offline", "one process")
    run_dir = at_step(whole, tmp_path / "run", 4)
    newest = run_dir / "checkpoints" / "step_000004"
    file = max(newest.iterdir(), key=lambda path: path.stat().st_size) if damage != "manifest" else newest / "manifest.json"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    (told,) = resume(inputs, run_dir, "offline", function=what_is_told)
    assert f"passing over checkpoint {newest}: " in told
    same_as(run_dir, whole)
    # Its bytes stay, out of the way of the checkpoints that are kept.
    assert {path.name for path in (run_dir / "checkpoints").glob("*000004")} == {"step_000004", "unused_step_000004"}


def what_is_said_of_flipped_bytes(path: Path) -> dict[tuple[str, int], str | None]:
    """Of a checkpoint with one bit of one file changed: at its beginning, in its middle, at its end."""
    from megapref.config import Parallel
    from megapref.mcore import checkpoint, setup

    setup.start(Parallel(), 0)
    assert checkpoint.verify(path) is None
    said = {}
    for file in path.iterdir():
        content = file.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            said[file.name, place] = checkpoint.verify(path)
        file.write_bytes(content)
    return said


def test_flipped_bytes_of_any_file_are_found(inputs, whole_run, tmp_path):
    path = Path(shutil.copytree(whole_run("offline", "tp2") / "checkpoints" / "step_000002", tmp_path / "step_000002"))
    (said,) = run_distributed(what_is_said_of_flipped_bytes, 1, path)
    assert {name for name, _ in said} == {"__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json", "state.json", "manifest.json"}
    assert all(problem == f"{name} is not what was saved" for (name, _), problem in said.items() if name != "manifest.json"), said
    assert all(said.values())
    file = max(path.iterdir(), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    (message,) = resume(inputs, tmp_path / "run", "offline", path=path)
    assert message.startswith(f"checkpoint {path} is not usable: {file.name} is not what was saved")


def test_no_usable_checkpoint_is_an_error_and_nothing_is_changed(inputs, whole_run, tmp_path):
    run_dir = at_step(whole_run("offline", "one process"), tmp_path / "run", 2)
    (run_dir / "checkpoints" / "step_000002" / "manifest.json").unlink()
    before = (run_dir / "metrics.jsonl").read_bytes()
    (message,) = resume(inputs, run_dir, "offline")
    assert "none of the 1 checkpoints is usable" in message and str(run_dir) in message
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_resume_of_a_finished_run_only_exports_again(inputs, whole_run, tmp_path):
    whole = whole_run("online", "one process")
    run_dir = Path(shutil.copytree(whole, tmp_path / "run"))
    (run_dir / "hf" / "config.json").unlink()  # as a user's own mistake would leave it
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert resume(inputs, run_dir, "online") == [""]
    after = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    added = {path.relative_to(run_dir).as_posix() for path in after.keys() - before.keys()}
    assert added - {"config.resume-1.yaml"} == {"environment.resume-1.json", "hf/config.json"}
    assert {path for path in before if after[path] != before[path]} == set()


def test_auto_without_a_checkpoint_starts_a_run(inputs, whole_run, tmp_path):
    assert resume(inputs, tmp_path / "run", "offline") == [""]
    same_as(tmp_path / "run", whole_run("offline", "one process"))


def test_going_back_to_an_older_checkpoint(inputs, whole_run, tmp_path):
    whole = whole_run("offline", "one process")
    run_dir = Path(shutil.copytree(whole, tmp_path / "run"))
    assert resume(inputs, run_dir, "offline", path=run_dir / "checkpoints" / "step_000002", save={"every": 2, "keep": 1, "export": True}) == [""]
    same_as(run_dir, whole)
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names == {"step_000005", "unused_step_000004", "unused_step_000005"}  # one kept of this run, those of the earlier one set aside


def test_checkpoint_of_another_run(inputs, whole_run, tmp_path):
    """A new directory goes on from it; one that holds a run is left alone."""
    whole = whole_run("offline", "one process")
    assert resume(inputs, tmp_path / "new", "offline", path=whole / "checkpoints" / "step_000002") == [""]
    assert numbers(tmp_path / "new") == numbers(whole)[3:]
    other = Path(shutil.copytree(whole, tmp_path / "other", ignore=shutil.ignore_patterns("hf")))
    (message,) = resume(inputs, other, "offline", path=whole / "checkpoints" / "step_000002")
    assert "already holds a run" in message
    assert numbers(other) == numbers(whole)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"run": {"seed": 4}}, ["run.seed", "4", "3"]),
        ({"train": {"steps": 5, "global_batch_size": 4}}, ["train.global_batch_size", "4", "5"]),
        ({"train": {"steps": 1}}, ["train.steps=1", "2"]),
        ({"data": "other rows"}, ["data.train"]),
        ({"model": "other weights"}, ["model.path"]),
    ],
    ids=str,
)
def test_resume_as_another_run_is_refused(inputs, whole_run, tmp_path, groups, said):
    run_dir = at_step(whole_run("offline", "one process"), tmp_path / "run", 2)
    before = (run_dir / "metrics.jsonl").read_bytes()
    if "data" in groups:
        rows = [json.loads(line) for line in Path(inputs["pairs"]).read_text().splitlines()]
        groups = {"data": {"train": [{"path": write_rows(tmp_path / "rows.jsonl", [*rows[1:], rows[0]])}]}}
    if "model" in groups:
        (tmp_path / "other").mkdir()
        groups = {"model": {"path": make_inputs(tmp_path / "other", seed=1)["model"]}}
    (message,) = resume(inputs, run_dir, "offline", **groups)
    assert message.startswith("cannot resume from") and all(part in message for part in said)
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_options_of_the_optimizer_are_those_of_the_resumed_config(inputs, whole_run, tmp_path):
    changed = {"lr": 1e-3, "weight_decay": 0.5, "betas": [0.5, 0.9], "eps": 1e-2, "schedule": "constant", "warmup_steps": 0}
    run_dir = at_step(whole_run("offline", "one process"), tmp_path / "run", 2)
    assert resume(inputs, run_dir, "offline", optimizer=changed) == [""]
    assert [record["lr"] for record in numbers(run_dir)[3:]] == [1e-3] * 3
    tree = options(inputs, run_dir, "offline", optimizer=changed)
    (options_used,) = run_distributed(optimizer_options, 1, tree, run_dir / "checkpoints" / "step_000005")
    assert options_used == {"weight_decay": {0.0, 0.5}, "betas": {(0.5, 0.9)}, "eps": {1e-2}}


def optimizer_options(tree: dict, path: Path) -> dict:
    from megapref.config import Config
    from megapref.mcore import setup
    from megapref.schema import build
    from megapref.train import build as build_run

    cfg = build(Config, {**tree, "train": {"steps": 5, "global_batch_size": 5}}, [])
    setup.start(cfg.parallel, 0)
    groups = build_run(cfg, path).state.optimizer.param_groups
    return {name: {tuple(g[name]) if name == "betas" else g[name] for g in groups} for name in ("weight_decay", "betas", "eps")}


@pytest.mark.parametrize(("world", "parallel"), [(2, {"tensor": 2}), (2, {"pipeline": 2}), (1, {})], ids=str)
def test_resume_at_another_layout(inputs, whole_run, tmp_path, world, parallel):
    whole = whole_run("online", "dp2")
    run_dir = at_step(whole, tmp_path / "run", 2)
    tree = options(inputs, run_dir, "online", parallel=parallel, train={"steps": 5}, run={"resume": "auto"})
    assert set(run_distributed(run_training, world, tree)) == {""}
    for record, expected in zip(numbers(run_dir), numbers(whole), strict=True):
        for name in expected.keys() & {"loss", "grad_norm", "eval/reward"}:
            assert record[name] == pytest.approx(expected[name], rel=1e-5), (record["step"], name)
