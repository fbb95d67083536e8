"""How chaos.py starts and kills a run: by forking from a process that has imported everything, or by torchrun."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from megapref.config import Config

ROOT = Path(__file__).resolve().parents[1]
VICTIMS = ("one process", "all processes", "launcher and processes")
LOOK = 0.01  # seconds between two looks at a run
_PLACE_BYTES = 80

Start = Callable[[Path], BaseProcess]  # begins or resumes the run of a directory; what comes is its launcher, the parent of its processes


def forked(cfg: Config, processes: int) -> Start:
    """Starts by forking, which costs no imports."""
    _process(gc.freeze).join()  # when it has ended, the process that forks has imported all

    def start(run_dir: Path) -> BaseProcess:
        _place_file(run_dir).write_bytes(bytes(_PLACE_BYTES))
        own = replace(cfg, run=replace(cfg.run, dir=str(run_dir), resume="auto"))
        return _process(_launch, own, processes, _place_file(run_dir), log_of(run_dir))

    return start


def by_torchrun(recipe: list[str], processes: int) -> Start:
    """Starts by a torchrun command with the recipe's arguments; one that fails is not started again by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(ROOT / "launchers" / "train.py")]

    def start(run_dir: Path) -> BaseProcess:
        return _process(_execute, [*command, *recipe, f"run.dir={run_dir}", "run.resume=auto"], log_of(run_dir))

    return start


def _process(function: Callable[..., None], *args) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megapref.train", "numpy.ma", "pandas", "megatron.core.models.mimo"])  # as a first step does
    launcher = context.Process(target=function, args=args)
    launcher.start()
    return launcher


def _execute(command: list[str], log: Path) -> None:
    _write_to(log)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.execv(command[0], command)


def _launch(cfg: Config, processes: int, place: Path, log: Path) -> None:
    """Forks the ranks, and kills the others when one ends with an error, as launchers do."""
    gc.freeze()  # what is imported is never garbage: looking at it in every process would copy its memory
    from torch.distributed import TCPStore

    _write_to(log)
    meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where the ranks meet, as torchrun's agent holds it
    left, code = set(), 0
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            _run_rank(cfg, rank, processes, meeting.port, place)
        left.add(pid)
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status != 0 and not code:
            code = 1
            for other in left:
                _signal(other)
    sys.exit(code)


def _write_to(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)


def _run_rank(cfg: Config, rank: int, processes: int, port: int, place: Path) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()} | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
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
            time.sleep(LOOK / 2)


def place_of(run_dir: Path) -> str | None:
    """Step and phase of the first rank, None where it does not note them."""
    return (_place_file(run_dir).read_bytes().decode().strip("\0 ") or "start") if _place_file(run_dir).exists() else None


def _place_file(run_dir: Path) -> Path:
    return run_dir.with_suffix(".place")


def log_of(run_dir: Path) -> Path:
    return run_dir.with_suffix(".log")


def strike(launcher: BaseProcess, victim: str, chance: random.Random) -> None:
    """Kills, and returns when every process has ended."""
    try:
        ranks = psutil.Process(launcher.pid).children()
    except psutil.NoSuchProcess:  # it has ended by itself
        ranks = []
    for process in {VICTIMS[0]: ranks and [chance.choice(ranks)], VICTIMS[1]: ranks}.get(victim) or [launcher, *ranks]:
        _signal(process.pid)
    launcher.join()
    while any(_is_there(process) for process in ranks):
        time.sleep(LOOK)


def _is_there(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
