"""Kills a run at random moments and resumes it, again and again, and compares it with the run that nothing disturbed.

python tools/chaos.py --config-name dpo --kills 50 --processes 2 --dir runs/chaos train.steps=20 save.every=3

Takes a recipe and overrides as launchers/train.py does. Killed (SIGKILL) is one process, all of them, or the launcher that has started them. After
every kill the metrics so far must be those of the undisturbed run, and no more steps may be done again than those since the last save; a run that
came to its end must equal it to the last bit, exported weights included. Then another one is begun, until there were enough kills. Processes are
forked from one that has imported everything, so a start costs what the run itself does. Exit code 0: nothing was lost, 1: something was.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from megapref.config import Config, load
from megapref.runlog import read_metrics

VICTIMS = ("one process", "all processes", "the launcher")
OF_TIME = ("time/", "memory/", "perf/", "data/")  # what differs between equal runs, or is told once at a start
_PR_SET_PDEATHSIG = 1
_PLACE_BYTES = 80


@dataclass(frozen=True)
class Kill:
    """What was killed, where the first rank was, the steps that metrics.jsonl had, and those of the newest checkpoint."""

    victim: str
    place: str
    done: int
    saved: int


def torment(cfg: Config, folder: Path, processes: int, kills: int, seed: int) -> list[Kill]:
    """Returns the kills that the config's run survived in `folder`; RuntimeError says what was lost, or why a run did not end well."""
    chance = random.Random(seed)
    whole = folder / "whole"
    started = time.monotonic()
    _expect_end(_start(cfg, whole, processes)[0], whole)
    seconds = time.monotonic() - started
    survived: list[Kill] = []
    run_dir = folder / "killed"
    while len(survived) < kills:
        launcher, ranks, place = _start(cfg, run_dir, processes)
        launcher.join(chance.uniform(0, seconds))
        if launcher.is_alive():
            victim = chance.choice(VICTIMS)
            where = place.read_bytes()[:_PLACE_BYTES].decode().strip("\0 ")
            for pid in {VICTIMS[0]: [chance.choice(ranks)], VICTIMS[1]: ranks, VICTIMS[2]: [launcher.pid]}[victim]:
                _kill(pid)
            launcher.join()
            survived.append(_survived(cfg, run_dir, whole, victim, where))
        else:
            _expect_end(launcher, run_dir)
            _compare(run_dir, whole)
            shutil.rmtree(run_dir)
    _expect_end(_start(cfg, run_dir, processes)[0], run_dir)
    _compare(run_dir, whole)
    return survived


def table(kills: list[Kill]) -> str:
    """The kills by phase and by victim, with the steps that were done again."""
    lines = [f"{'killed in':<44}{'kills':>6}{'steps redone':>14}{'at most':>9}"]
    groups: dict[str, list[Kill]] = defaultdict(list)
    for kill in kills:
        groups[kill.place.partition(", ")[2] or "start"].append(kill)
    for name, own in [*sorted(groups.items()), *((victim, [k for k in kills if k.victim == victim]) for victim in VICTIMS), ("all", kills)]:
        redone = [kill.done - kill.saved for kill in own]
        lines.append(f"{name:<44}{len(own):>6}{sum(redone):>14}{max(redone, default=0):>9}")
    return "\n".join(lines)


def _start(cfg: Config, run_dir: Path, processes: int) -> tuple[multiprocessing.Process, list[int], Path]:
    """The launcher's process, its ranks', and the file that has the first rank's place."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megapref.train"])
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    place = run_dir.with_suffix(".place")
    place.write_bytes(bytes(_PLACE_BYTES))
    cfg = replace(cfg, run=replace(cfg.run, dir=str(run_dir), resume="auto"))
    ours, theirs = context.Pipe(duplex=False)
    launcher = context.Process(target=_launch, args=(cfg, processes, place, run_dir.with_suffix(".log"), theirs))
    launcher.start()
    return launcher, ours.recv(), place


def _launch(cfg: Config, processes: int, place: Path, log: Path, connection) -> None:
    """Forks the ranks, and kills the others when one ends with an error, as launchers do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    ranks = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            _run_rank(cfg, rank, processes, port, place)
        ranks.append(pid)
    connection.send(ranks)
    left, code = set(ranks), 0
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status != 0 and not code:
            code = 1
            for other in left:
                _kill(other)
    sys.exit(code)


def _run_rank(cfg: Config, rank: int, processes: int, port: int, place: Path) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # dies with its launcher
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    code = 1
    try:
        import torch

        from megapref.train import main

        torch.set_num_threads(1)
        if rank == 0:
            threading.Thread(target=_note_place, args=(place,), daemon=True).start()
        main(cfg)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _note_place(place: Path) -> None:
    from megapref.phases import here

    with place.open("r+b", buffering=0) as file:
        while True:
            file.seek(0)
            file.write(str(here)[:_PLACE_BYTES].ljust(_PLACE_BYTES).encode())
            time.sleep(0.005)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.kill(pid, signal.SIGKILL)


def _survived(cfg: Config, run_dir: Path, whole: Path, victim: str, place: str) -> Kill:
    done, expected = _numbers(run_dir), _numbers(whole)
    if done != expected[: len(done)]:
        raise RuntimeError(f"{run_dir}: killed at {place}, its metrics are not those of {whole}")
    steps = [int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*")]
    kill = Kill(victim, place, max((record["step"] for record in done), default=0), max(steps, default=0))
    bound = cfg.save.every * (2 if cfg.save.background else 1)  # one in the background is there a save later at the latest
    if cfg.save.every and kill.done - kill.saved > bound:
        raise RuntimeError(f"{run_dir}: killed at {place} after step {kill.done}, its newest checkpoint is of step {kill.saved}")
    return kill


def _expect_end(launcher: multiprocessing.Process, run_dir: Path) -> None:
    launcher.join()
    if launcher.exitcode != 0:
        raise RuntimeError(f"{run_dir}: the run ended with an error:\n{run_dir.with_suffix('.log').read_text()[-3000:]}")


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


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", required=True, help="the recipe")
    parser.add_argument("--config-dir", help="more recipes and groups")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    parser.add_argument("--dir", type=Path, default=Path("runs/chaos"), help="where the runs go; must not exist")
    options, overrides = parser.parse_known_args(argv)
    try:
        if options.dir.exists():
            raise ValueError(f"--dir={options.dir} exists already; remove it, or name another one")
        cfg = load(options.config_name, overrides, options.config_dir, options.processes)
        if not cfg.save.every:
            raise ValueError("save.every=0 saves at the end only, so every kill would begin anew; give it a number of steps")
        kills = torment(cfg, options.dir, options.processes, options.kills, options.seed)
    except (ValueError, RuntimeError) as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(table(kills))
    print(f"{len(kills)} kills, losses lost: 0; every run that came to its end equals the undisturbed one, weights included")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
