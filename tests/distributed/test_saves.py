"""Checkpoints that cannot be written, and those that are written beside training: nothing is lost, and the run ends or goes on as it was told."""

import errno
import json
import os
import resource
import signal
import time
import weakref
from pathlib import Path

import pytest
from distributed_run import run_distributed, signals_of
from tiny_runs import make_inputs, metrics_of, numbers, options, run_training

WORLDS = {"dp2": {}, "tp2": {"tensor": 2}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The directory of a run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_distributed(run_training, 2, tree_of(inputs, run_dir)) == ["", ""]
    return run_dir


def tree_of(inputs, run_dir: Path, world: str = "dp2", resume: str | None = None, **save) -> dict:
    groups = {"parallel": WORLDS[world], "train": {"steps": 5}, "save": {"every": 2, "keep": 3, "export": True, **save}}
    return options(inputs, run_dir, "offline", run={"dir": str(run_dir), "seed": 3, "resume": resume}, **groups)


def same_as(run_dir: Path, whole: Path) -> None:
    assert numbers(run_dir) == numbers(whole)
    assert (run_dir / "hf" / "model.safetensors").read_bytes() == (whole / "hf" / "model.safetensors").read_bytes()


def steps_saved(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def train_in_trouble(tree: dict, who: int, what: str, steps: list[int]) -> str:
    """Trains; one rank cannot write the checkpoints of the given steps, from the beginning or at the end, or may not, or nobody may."""
    from megapref import saves
    from megapref.mcore import saving

    begin, limits = saves.begin_save, resource.getrlimit(resource.RLIMIT_FSIZE)
    is_root, checkpoints = os.geteuid() == 0, Path(tree["run"]["dir"]) / "checkpoints"

    def begin_save(state, *args, **options):
        if state.step in steps and int(os.environ["RANK"]) == who:
            if what == "permission":
                checkpoints.chmod(0o555)
                os.seteuid(65534 if is_root else os.geteuid())  # root may write everywhere
            elif what == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        return begin(state, *args, **options)

    def checksums(*files):
        if int(files[0].parent.name.rpartition("_")[2]) in steps and int(os.environ["RANK"]) == who:
            raise OSError(errno.ENOSPC, "No space left on device")
        return read(*files)

    def mend(*args, **options):
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if what == "permission":
            os.seteuid(0 if is_root else os.geteuid())
            checkpoints.chmod(0o755)

    def save(self, *args, **options):
        try:
            return real(self, *args, **options)
        finally:
            mend()

    def make_empty(folder):
        if int(folder.name.rpartition("_")[2]) in steps:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))
        empty(folder)

    real, read, empty = saves.Saves.save, saving._checksums, saving._make_empty
    if what == "read-only":
        saving._make_empty = make_empty
    if what.startswith("at the end"):
        saving._checksums = lambda *files: checksums(*files) if len(files) == 1 else read(*files)
    if what == "index":  # Core's, of all files, which the first rank writes when they are there
        saving._checksums = lambda *files: read(*files) if len(files) == 1 else checksums(*files)
    saves.begin_save, saves.Saves.save = begin_save, save
    try:
        return run_training(tree)
    finally:
        saves.begin_save, saves.Saves.save, saving._checksums, saving._make_empty = begin, real, read, empty


@pytest.mark.parametrize(
    ("who", "what", "said"),
    [
        (0, "full", "rank 0: File too large"),
        (1, "full", "rank 1: File too large"),
        (0, "index", "No space left"),
        (0, "permission", "Permission denied"),
        (0, "read-only", "Read-only file system"),
        (1, "at the end, beside training", "rank 1: No space left on device"),
    ],
)
def test_checkpoint_that_cannot_be_written_ends_the_run(inputs, tmp_path, who, what, said):
    """All ranks say so in a line, nothing half written is left, and the earlier checkpoint still serves."""
    run_dir, world = tmp_path / "run", "dp2" if what == "permission" else "tp2"
    tree = tree_of(inputs, run_dir, world, background="beside" in what)
    first, second = run_distributed(train_in_trouble, 2, tree, who, what, [4])
    assert first == second and len(first.splitlines()) == 1
    assert first.startswith(f"cannot write the checkpoint {run_dir / 'checkpoints' / 'step_000004'}: ") and said in first
    assert steps_saved(run_dir) == ["step_000002"]
    assert run_distributed(run_training, 2, tree_of(inputs, run_dir, world, "auto")) == ["", ""]
    assert metrics_of(run_dir)[-1]["step"] == 5
    assert steps_saved(run_dir) == ["step_000002", "step_000004", "step_000005"]


@pytest.mark.parametrize(("what", "background"), [("full", False), ("read-only", False), ("at the end", True)])
def test_training_goes_on_where_it_is_told_to(inputs, whole, tmp_path, what, background):
    """Without two checkpoints, though one of them was the best, and otherwise as the run that nothing disturbed."""
    run_dir = tmp_path / "run"
    tree = tree_of(inputs, run_dir, on_error="continue", background=background, keep_best=1)
    tree["evaluation"] |= {"metric": "validation-same_loss", "goal": "max"}
    assert run_distributed(train_in_trouble, 2, tree, 0, what, [2, 4]) == ["", ""]
    same_as(run_dir, whole)
    assert steps_saved(run_dir) == ["step_000005"]


def train_with_slow_writer(tree: dict, event: str | None = None) -> str:
    """Trains; what is written in the background waits for the step after. There may be an `event` on one rank.

    "kill": of the first one, while the checkpoint of step 4 is written. "signals": the second one is asked to stop while that of step 2 is written,
    and again while that of step 3 is. Every time, the copies of earlier checkpoints must be gone.
    """
    from megapref import signals, train
    from megapref.mcore import saving
    from megapref.phases import here

    write, train_step, rank, copies = saving._write, train.train_step, os.environ["RANK"], []
    is_asked = event == "signals" and rank == "1"

    def slow(job, buckets):
        step = int(job.path.name.removeprefix("step_"))
        assert not [of for of, copy in copies if of != step and copy() is not None]
        copies.extend((step, weakref.ref(tensor)) for _, _, (_, tensors) in buckets for _, tensor in tensors if job.thread)
        while job.thread and (here.step <= step or (is_asked and not signals.asked_to_stop())):
            time.sleep(0.01)
        if (event, step, rank) == ("kill", 4, "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        if is_asked and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        write(job, buckets)

    def step_and_signal(state, *args):
        metrics = train_step(state, *args)
        if is_asked and state.step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return metrics

    saving._write, train.train_step = slow, step_and_signal
    try:
        with signals.noted():
            return run_training(tree)
    finally:
        saving._write, train.train_step = write, train_step


def test_checkpoints_written_beside_training_are_those_of_their_steps(inputs, whole, tmp_path):
    run_dir = tmp_path / "run"
    assert run_distributed(train_with_slow_writer, 2, tree_of(inputs, run_dir, background=True)) == ["", ""]
    same_as(run_dir, whole)
    assert steps_saved(run_dir) == steps_saved(whole)
    for name in steps_saved(whole):
        ours, theirs = (json.loads((folder / "checkpoints" / name / "manifest.json").read_text()) for folder in (run_dir, whole))
        tensors = [file for file in theirs if file.endswith(".distcp")]
        assert tensors and {file: ours[file] for file in tensors} == {file: theirs[file] for file in tensors}


def test_kill_while_a_checkpoint_is_written_beside_training(inputs, whole, tmp_path):
    run_dir = tmp_path / "run"
    assert signals_of(train_with_slow_writer, 2, tree_of(inputs, run_dir, background=True), "kill")[0] == signal.SIGKILL
    assert steps_saved(run_dir) == [".writing_step_000004", "step_000002"]
    assert run_distributed(run_training, 2, tree_of(inputs, run_dir, resume="auto", background=True)) == ["", ""]
    same_as(run_dir, whole)
    assert steps_saved(run_dir) == steps_saved(whole)


def test_asked_to_stop_while_a_checkpoint_is_written_beside_training(inputs, whole, tmp_path):
    """It is finished, then that of the step is written, whatever signal comes meanwhile."""
    run_dir = tmp_path / "run"
    assert run_distributed(train_with_slow_writer, 2, tree_of(inputs, run_dir, background=True), "signals") == ["", ""]
    assert steps_saved(run_dir) == ["step_000002", "step_000003"]
    assert json.loads((run_dir / "stopped.json").read_text()) == {"step": 3, "reason": "SIGUSR1 was received"}
    assert run_distributed(run_training, 2, tree_of(inputs, run_dir, resume="auto", background=True)) == ["", ""]
    same_as(run_dir, whole)


def train_until_the_disk_is_full(tree: dict, file: str) -> str:
    """Trains; in step 3 the first rank cannot write the given file, nor print what it has to say."""
    from megapref import metrics_file, samples
    from megapref.data import ledger
    from megapref.phases import here

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    holder, name = {"metrics": (metrics_file.json, "dumps"), "ledger": (ledger.pq, "write_table"), "samples": (samples, "_replace")}[file]
    real = getattr(holder, name)

    def on_full_disk(*args, **options):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 if here.step == 3 else limits[0], limits[1]))
        return real(*args, **options)

    setattr(holder, name, on_full_disk)
    try:
        return run_training(tree)
    finally:
        setattr(holder, name, real)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("file", ["metrics", "ledger", "samples"])
def test_full_disk_elsewhere_is_a_clear_end_or_told(inputs, tmp_path, file):
    run_dir = tmp_path / "run"
    groups = {"train": {"steps": 4}, "save": {"every": 2, "export": False}}
    tree = options(inputs, run_dir, "online", **groups)
    first, second = run_distributed(train_until_the_disk_is_full, 2, tree, file)
    assert first == second == f"run.dir={run_dir}: cannot write there, File too large; choose a run.dir that you may write to"
    assert steps_saved(run_dir) == ["step_000002"]
    tree["run"] = {**tree["run"], "resume": "auto"}
    assert run_distributed(run_training, 2, tree) == ["", ""]
    assert [record["step"] for record in metrics_of(run_dir)] == [0, 1, 2, 3, 4]
    tree["run"], tree["save"]["on_error"] = {**tree["run"], "dir": str(tmp_path / "going on")}, "continue"
    assert run_distributed(train_until_the_disk_is_full, 2, tree, file) == ["", ""]
    lost = 4 if file == "samples" else 3  # the limit stays until the next file of that kind
    assert numbers(tmp_path / "going on") == [record for record in numbers(run_dir) if record["step"] != lost]
    assert steps_saved(tmp_path / "going on") == ["step_000002", "step_000004"]
