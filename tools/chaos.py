"""Kills a run at random moments and resumes it, again and again, and compares it with the run that nothing disturbed.

python tools/chaos.py --config-name dpo --kills 50 --processes 2 --dir runs/chaos train.steps=20 save.every=3

Takes a recipe and overrides as launchers/train.py does. Killed (SIGKILL) is one process, all of them, or they and the launcher that has started
them, as when a machine fails. After every kill the metrics so far must be those of the undisturbed run, and no more steps may be done again than
those since the last save; a run that came to its end must equal it to the last bit, exported weights included. Then another one is begun, until
there were enough kills. Processes are forked from one that has imported everything, so a start costs what the run itself does; with
--launcher torchrun each start is a torchrun command. Exit code 0: nothing was lost, 1: something was, 2: a mistake in the config.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from chaos_runs import LOOK, VICTIMS, Start, by_torchrun, forked, log_of, place_of, strike

from megapref.config import Config, load
from megapref.metrics_file import read_metrics

OF_TIME = ("time/", "memory/", "perf/", "data/")  # what differs between equal runs, or is told once at a start
SHARE_OF_STARTS = 0.2  # of the kills, before the first step that a start does
SHARE_OF_ENDS = 0.25  # of a run's time, that what is left of it is given more: some come to their end, and the next begins at step 0


@dataclass(frozen=True)
class Kill:
    """What was killed, at which step and phase of the first rank, whether a checkpoint was half written, and what was there then."""

    victim: str
    place: str
    writing: bool
    done: int  # the last step in metrics.jsonl
    saved: int  # the step of the newest checkpoint

    def __str__(self) -> str:
        half = ", a checkpoint half written" if self.writing else ""
        return f"{self.victim} at {self.place}{half}; {self.done} steps done, {self.saved} saved"


def steps_between_saves(cfg: Config) -> int:
    """At most: a checkpoint that is written in the background is there one save later."""
    return cfg.save.every * (2 if cfg.save.background else 1)


def torment(start: Start, save_every: int, folder: Path, kills: int, seed: int, told: Callable[[str], None] = print) -> list[Kill]:
    """Returns the kills that the run survived in `folder`; RuntimeError says what was lost, or why a run did not end well.

    `save_every`: what `steps_between_saves` says of its config.
    """
    whole, run_dir = folder / "whole", folder / "killed"
    folder.mkdir(parents=True, exist_ok=True)
    began = time.time()
    launcher, steps = _begin(start, whole)
    _wait(launcher, steps)
    stepped = time.time()
    _expect_end(launcher, whole)
    seconds, total = (whole / "metrics.jsonl").stat().st_mtime - stepped, _done(whole)  # from the first step to the last
    survived: list[Kill] = []
    for attempt in itertools.count():
        if len(survived) == kills:
            break
        chance, saved, half_written = random.Random(f"{seed}/{attempt}"), _saved(run_dir), _half_written(run_dir)
        launcher, steps = _begin(start, run_dir)
        if chance.random() < SHARE_OF_STARTS:
            launcher.join(chance.uniform(0, stepped - began))
            again = None
        else:
            _wait(launcher, steps)
            again = time.time()
            launcher.join(chance.uniform(0, seconds * ((total - saved) / total + SHARE_OF_ENDS)))
        if launcher.is_alive():
            victim, place = chance.choice(VICTIMS), place_of(run_dir) or f"step {_done(run_dir) + 1}, some phase"
            strike(launcher, victim, chance)
            survived.append(_survived(run_dir, whole, save_every, victim, place, half_written))
            told(f"kill {len(survived)} of {kills} (seed {seed}/{attempt}): {survived[-1]}")
        else:
            _expect_end(launcher, run_dir)
            _compare(run_dir, whole)
            if again and not saved:  # on a machine that was busy when it was measured, most runs would come to their end
                seconds = min(seconds, (run_dir / "metrics.jsonl").stat().st_mtime - again)
            shutil.rmtree(run_dir)
    _expect_end(_begin(start, run_dir)[0], run_dir)
    _compare(run_dir, whole)
    return survived


def table(kills: list[Kill]) -> str:
    """The kills by phase and by victim, with the steps that were done again."""
    lines = [f"{'killed in':<44}{'kills':>6}{'steps redone':>14}{'at most':>9}"]
    groups: dict[str, list[Kill]] = defaultdict(list)
    for kill in kills:
        groups[kill.place.partition(", ")[2] or kill.place].append(kill)
    rows = [*sorted(groups.items()), ("with a checkpoint half written", [kill for kill in kills if kill.writing])]
    rows += [(victim, [kill for kill in kills if kill.victim == victim]) for victim in VICTIMS]
    for name, own in [*rows, ("all", kills)]:
        redone = [kill.done - kill.saved for kill in own]
        lines.append(f"{name:<44}{len(own):>6}{sum(redone):>14}{max(redone, default=0):>9}")
    return "\n".join(lines)


def _begin(start: Start, run_dir: Path) -> tuple[BaseProcess, Callable[[], int]]:
    """The launcher, and what tells how many steps it has done that no checkpoint had."""
    saved, before = _saved(run_dir), _state_of(run_dir / "metrics.jsonl")
    # A start replaces the file, as it removes the steps that it does again.
    return start(run_dir), lambda: 0 if _state_of(run_dir / "metrics.jsonl") == before else _done(run_dir) - saved


def _wait(launcher: BaseProcess, until: Callable[[], int]) -> None:
    while launcher.is_alive() and not until():
        launcher.join(LOOK)


def _survived(run_dir: Path, whole: Path, save_every: int, victim: str, place: str, half_written: set[tuple]) -> Kill:
    done, expected = _numbers(run_dir), _numbers(whole)
    if done != expected[: len(done)]:
        raise RuntimeError(f"{run_dir}: killed at {place}, its metrics are not those of {whole}")
    kill = Kill(victim, place, bool(_half_written(run_dir) - half_written), _done(run_dir), _saved(run_dir))
    if kill.done - kill.saved > save_every:
        raise RuntimeError(f"{run_dir}: killed at {place} after step {kill.done}, its newest checkpoint is of step {kill.saved}")
    _expect_checkpoints(run_dir)
    return kill


def _expect_end(launcher: BaseProcess, run_dir: Path) -> None:
    launcher.join()
    if launcher.exitcode != 0:
        raise RuntimeError(f"{run_dir}: the run ended with an error:\n{log_of(run_dir).read_text()[-3000:]}")
    _expect_checkpoints(run_dir)


def _expect_checkpoints(run_dir: Path) -> None:
    """The run has gone on from the newest one."""
    if "passing over checkpoint" in log_of(run_dir).read_text():
        raise RuntimeError(f"{run_dir}: a checkpoint was spoilt:\n{log_of(run_dir).read_text()[:3000]}")


def _compare(run_dir: Path, whole: Path) -> None:
    if _numbers(run_dir) != _numbers(whole):
        raise RuntimeError(f"{run_dir}: its metrics are not those of {whole}")
    for path in (whole / "hf").glob("*.safetensors"):
        if path.read_bytes() != (run_dir / "hf" / path.name).read_bytes():
            raise RuntimeError(f"{run_dir}: its weights are not those of {whole} ({path.name})")


def _numbers(run_dir: Path) -> list[dict]:
    """What every step measured, as text less its times, so that a NaN equals another."""
    path = run_dir / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    return [{key: json.dumps(value) if key != "step" else value for key, value in r.items() if not key.startswith(OF_TIME)} for r in records]


def _done(run_dir: Path) -> int:
    return max((record["step"] for record in _numbers(run_dir)), default=0)


def _saved(run_dir: Path) -> int:
    return max((int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*")), default=0)


def _half_written(run_dir: Path) -> set[tuple]:
    return {(path.name, *_state_of(path)) for path in (run_dir / "checkpoints").glob(".writing_step_*")}


def _state_of(path: Path) -> tuple:
    """Changes when a file is replaced or grows, a folder gets files."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", required=True, help="the recipe")
    parser.add_argument("--config-dir", help="more recipes and groups")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    launchers = ("torchrun",) if torch.cuda.is_available() else ("fork", "torchrun")  # what was forked cannot use a GPU
    parser.add_argument("--launcher", choices=launchers, default=launchers[0], help="how the run is started every time")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    parser.add_argument("--dir", type=Path, default=Path("runs/chaos"), help="where the runs go; must not exist")
    options, overrides = parser.parse_known_args(argv)
    try:
        if options.dir.exists():
            raise ValueError(f"--dir={options.dir} exists already; remove it, or name another one")
        cfg = load(options.config_name, overrides, options.config_dir, options.processes)
        if not cfg.save.every:
            raise ValueError("save.every=0 saves at the end only, so every kill would begin anew; give it a number of steps")
        recipe = ["--config-name", options.config_name, *(["--config-dir", options.config_dir] if options.config_dir else []), *overrides]
        start = forked(cfg, options.processes) if options.launcher == "fork" else by_torchrun(recipe, options.processes)
        kills = torment(start, steps_between_saves(cfg), options.dir, options.kills, options.seed, partial(print, flush=True))
    except (ValueError, RuntimeError) as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(table(kills))
    print(f"{len(kills)} kills, losses lost: 0; every run that came to its end equals the undisturbed one, weights included")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
