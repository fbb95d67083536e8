"""What a user sees of a run, written by rank 0: the run directory, metrics, TensorBoard, Weights & Biases, samples, the console.

    RUN_DIR/config.yaml         the resolved config (config.resume-<n>.yaml where a resumed run's differs)
    RUN_DIR/environment.json    versions, commit, command line, device, kernels (environment.resume-<n>.json for each resumption)
    RUN_DIR/metrics.jsonl       one JSON object per step (see metrics_file.py)
    RUN_DIR/samples/            tables of sample completions (see samples.py)
    RUN_DIR/completions.html    the same for people
    RUN_DIR/tensorboard/        the same numbers and tables as events
    RUN_DIR/stopped.json        step and reason of a run that was asked to stop, until it is resumed

Nothing of an earlier run is overwritten: without `resume` a directory that holds a run is refused.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from megapref import display, metrics_file, samples
from megapref.samples import json_value

PACKAGES = ("megapref", "torch", "megatron-core", "transformers", "datasets", "hydra-core", "numpy")


@contextmanager
def os_errors_told(path: Path, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Turns what the file system refuses into a ValueError that names the directory, the cause and the remedy; with `say`, it is only said."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            cause, remedy = "the disk is full", "free some space, or choose another run.dir"
        elif error.errno in (errno.EEXIST, errno.ENOTDIR):
            cause, remedy = f"a file is in the way ({error.filename})", "choose another run.dir"
        else:
            cause, remedy = error.strerror or str(error), "choose a run.dir that you may write to"
        if say is None:
            raise ValueError(f"run.dir={path}: cannot write there, {cause}; {remedy}") from error
        say(f"run.dir={path}: cannot write there, {cause}; training goes on without what was to be written, as save.on_error=continue")


def create_run_dir(path: str | Path, resolved_yaml: str, resume: bool, device: dict[str, Any] | None = None) -> Path:
    """The run directory, with config and environment on record; ValueError if it cannot be written, or holds a run and not `resume`.

    `device` is what mcore/capabilities.py reports, added to the environment.
    """
    path, is_old = Path(path), holds_run(Path(path))
    if is_old and not resume:
        raise ValueError(f"run.dir={path} already holds a run; use run.resume=auto to go on with it, or another run.dir")
    environment = json.dumps(environment_report() | (device or {}), indent=2) + "\n"
    with os_errors_told(path):
        path.mkdir(parents=True, exist_ok=True)
        if not is_old:
            _set_aside(path)
            _write_new(path / "config.yaml", resolved_yaml)
            _write_new(path / "environment.json", environment)
            return path
        (path / "stopped.json").unlink(missing_ok=True)
        number = 1 + len(list(path.glob("environment.resume-*.json")))
        configs = [path / "config.yaml", *(path / f"config.resume-{earlier}.yaml" for earlier in range(1, number))]
        texts = [config.read_text() for config in configs if config.exists()]
        if not texts or texts[-1] != resolved_yaml:
            _write_new(path / f"config.resume-{number}.yaml", resolved_yaml)
        _write_new(path / f"environment.resume-{number}.json", environment)
    return path


def holds_run(path: Path) -> bool:
    """Whether a run has begun in the directory."""
    return (path / "metrics.jsonl").exists() or (path / "checkpoints").exists()


def _set_aside(path: Path) -> None:
    """Renames the record of a start that ended before its first step, so that config.yaml is the config of the run that took place."""
    if not ((path / "environment.json").exists() and (path / "config.yaml").exists()):
        return  # a config.yaml alone is not of our making, and is in the way
    number = 1 + len(list(path.glob("environment.unstarted-*.json")))
    (path / "config.yaml").rename(path / f"config.unstarted-{number}.yaml")
    (path / "environment.json").rename(path / f"environment.unstarted-{number}.json")


def _write_new(path: Path, text: str) -> None:
    with path.open("x") as file:
        file.write(text)


def environment_report() -> dict[str, Any]:
    """Versions, commit (with a flag for uncommitted changes), command line, world size and date: what it takes to repeat a run."""
    root = Path(__file__).resolve().parent.parent
    in_checkout = (root / ".git").exists()
    changes = _git(root, "status", "--porcelain") if in_checkout else None
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "git_commit": _git(root, "rev-parse", "--verify", "HEAD") if in_checkout else None,
        "git_dirty": None if changes is None else bool(changes),
        "command": shlex.join(sys.argv),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class RunLog:
    """Where a run's numbers, samples and messages go; with `run_dir` None (every rank but 0) it takes them and does nothing.

    `resumed_at` is the last step in the resumed checkpoint: later lines of metrics.jsonl are removed, as those steps are done again.
    What the file system refuses is a ValueError; where the run `goes_on` without what was to be written, a message.
    """

    def __init__(
        self,
        run_dir: Path | None,
        *,
        total_steps: int,
        resumed_at: int | None = None,
        tensorboard: bool = True,
        wandb: str | None = None,
        console: Console | None = None,
        goes_on: bool = False,
    ) -> None:
        self.run_dir = run_dir
        self.os_errors_told = partial(os_errors_told, run_dir, self.message if goes_on else None)
        if run_dir is None:
            return
        self._total = total_steps
        self._step = -1 if resumed_at is None else resumed_at
        self._console = console or Console()
        self._wandb = _open_wandb(wandb, run_dir, resumed_at) if wandb else None
        with os_errors_told(run_dir):
            kept = metrics_file.cut_after(run_dir / "metrics.jsonl", self._step)
            samples.cut_after(run_dir, self._step)
            self._tensorboard = _open_tensorboard(run_dir, self._step + 1) if tensorboard else None
        self._evaluation = {key: value for record in kept for key, value in record.items() if key.startswith("eval/")}
        self._evaluation_rows: list[dict[str, Any]] = []
        self._first: tuple[int, float] | None = None
        self._live = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Records everything that is known of a step: training and, where there was one, evaluation metrics in one call, steps rising."""
        if self.run_dir is None:
            return
        assert step > self._step, f"step {step} is written after step {self._step}"
        self._step = step
        metrics = {key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
        with self.os_errors_told():
            metrics_file.append(self.run_dir / "metrics.jsonl", step, metrics)
            for key, value in metrics.items() if self._tensorboard else ():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb:
            self._wandb.log(metrics, step=step)
        self._show(step, metrics)

    def _show(self, step: int, metrics: dict[str, Any]) -> None:
        evaluation = {key: value for key, value in metrics.items() if key.startswith("eval/")}
        self._evaluation |= evaluation
        fields = display.progress_fields(self._evaluation | metrics)
        left = self._time_left(step)
        if self._live:
            self._live.update(display.live_view(step, self._total, fields, left), refresh=True)
        elif len(metrics) > len(evaluation):
            self.message("  ".join([f"step {step}/{self._total}", *(" ".join(field) for field in fields), f"left {left}"]))
        if evaluation:
            self.message(display.evaluation_line(step, evaluation))

    def _time_left(self, step: int) -> str:
        """From the mean time of the steps since the first one written, whose own time is unknown."""
        now = time.monotonic()
        self._first = self._first or (step, now)
        first_step, first_time = self._first
        return display.format_duration((now - first_time) / (step - first_step) * (self._total - step)) if step > first_step else "?"

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Records sample completions: of training (prompt, first, second, ...) or of an evaluation (prompt, policy, opponent, ...)."""
        if self.run_dir is None or not rows:
            return
        with self.os_errors_told():
            kind = samples.write_table(self.run_dir, step, rows)
            if kind == "evaluation":
                self._evaluation_rows = rows
            shown = rows[: samples.PROMPTS]
            if self._tensorboard:
                self._tensorboard.add_text(f"samples/{kind}", display.markdown_table(shown), step)
            if self._wandb:
                self._wandb.log({f"samples/{kind}": _wandb_table(shown)}, step=step)

    def message(self, text: str) -> None:
        """Prints a line, above the progress bar where there is one; what cannot be printed, as its file's disk is full, is lost."""
        if self.run_dir is not None:
            with suppress(OSError):
                self._console.print(Text(text), soft_wrap=True)

    def stopped(self, step: int, reason: str) -> None:
        """Records that the run was asked to stop, for people and for the scripts that resume it."""
        if self.run_dir is None:
            return
        with self.os_errors_told():
            (self.run_dir / "stopped.json").write_text(json.dumps({"step": step, "reason": reason}) + "\n")
        self.message(f"saved and stopped after step {step}, as {reason}; go on with run.resume=auto")

    def summary(self, closing: dict[str, float] | None = None) -> None:
        """Prints main metrics, memory (`closing`: measured after the last record), samples before and after, and where everything is."""
        if self.run_dir is None:
            return
        if self._live:
            self._live.stop()
        self._console.print()
        records = metrics_file.read_metrics(self.run_dir / "metrics.jsonl") if (self.run_dir / "metrics.jsonl").exists() else []
        memory = display.peak_memory([*records, {"step": self._step} | (closing or {})])
        for table in (display.first_and_last(records), memory, display.before_and_after(self._evaluation_rows[:3])):
            if table.row_count:
                self._console.print(table)
        self.message(display.places(self.run_dir))

    def close(self) -> None:
        """Ends the display and flushes every event; safe to call twice."""
        if self.run_dir is None:
            return
        if self._live:
            self._live.stop()
        if self._tensorboard:
            with self.os_errors_told():
                self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _open_tensorboard(run_dir: Path, purge_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import, which readers of metrics are spared

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step, max_queue=1000, flush_secs=10)


def _open_wandb(project: str, run_dir: Path, resumed_at: int | None) -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError(f"log.wandb={project} needs the wandb package; pip install wandb, or set log.wandb=null") from None
    return wandb.init(project=project, name=run_dir.name, dir=str(run_dir), resume=None if resumed_at is None else "auto")


def _wandb_table(rows: list[dict[str, Any]]) -> Any:
    import wandb

    return wandb.Table(columns=list(rows[0]), data=[[json_value(value) for value in row.values()] for row in rows])
