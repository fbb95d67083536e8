"""What asks a run to save and stop before its end: a signal, or the time limit of its Slurm job.

A handler only notes its signal. The training loop looks after every step, when all processes can agree, and whoever has resumed the run from
its checkpoint has lost nothing.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime

EXIT_CODE = 85  # of a run that has saved and stopped because it was asked to: resume it
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
DEADLINE = 1000  # stands for the time limit where signals stand for themselves
UNITS = {"s": 1, "m": 60, "h": 3600}

_noted: list[int] = []


@contextmanager
def noted(then_ignored: bool = False) -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 are noted for `asked_to_stop` instead of ending the process; one that follows changes nothing.

    `then_ignored`, it changes nothing afterwards either, when a process ends whose exit code is known.
    """
    before = {number: signal.signal(number, lambda number, _: _noted.append(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if then_ignored else handler)
        _noted.clear()


def asked_to_stop(deadline: float | None = None) -> int:
    """Returns the number of the first signal noted, DEADLINE when the Unix time `deadline` has passed, or 0: the largest of all processes holds."""
    return _noted[0] if _noted else DEADLINE if deadline is not None and time.time() >= deadline else 0


def noted_within(seconds: float) -> bool:
    """Returns whether a signal has been noted, after waiting for one at most that long."""
    end = time.monotonic() + seconds
    while not _noted and time.monotonic() < end:
        time.sleep(0.05)
    return bool(_noted)


def reason(number: int) -> str:
    """Returns in words what `asked_to_stop` returned."""
    return "the job's time limit is near" if number == DEADLINE else f"{signal.Signals(number).name} was received"


def seconds(duration: str) -> int | None:
    """Returns how long `90s`, `10m` or `1h` is, None for another text."""
    match = re.fullmatch(r"(\d+)([smh])", duration)
    return int(match[1]) * UNITS[match[2]] if match else None


def deadline(before_end: str | None, environment: Mapping[str, str] = os.environ) -> float | None:
    """Returns the Unix time that is `before_end` before the Slurm job's time limit; None where there is no limit, or no job.

    ValueError where there is a job and its limit cannot be learnt.
    """
    job = environment.get("SLURM_JOB_ID")
    if before_end is None or job is None:
        return None
    end = environment.get("SLURM_JOB_END_TIME") or _end_time(job)  # the variable is there from Slurm 23 on
    return float(end) - seconds(before_end) if end else None


def _end_time(job: str) -> float | None:
    try:
        done = subprocess.run(["squeue", "--noheader", "--format=%e", "--jobs", job], capture_output=True, text=True)
        answer, error = done.stdout.strip(), done.stderr.strip()
    except FileNotFoundError:
        answer, error = "", "there is no squeue here"
    if answer in ("NONE", "N/A"):
        return None
    try:
        return datetime.fromisoformat(answer).timestamp()
    except ValueError:
        raise ValueError(
            f"save.before_deadline needs the time limit of Slurm job {job}, but {error or f'squeue says {answer}'}; "
            "set SLURM_JOB_END_TIME to it (in Unix seconds), or save.before_deadline=null"
        ) from None
