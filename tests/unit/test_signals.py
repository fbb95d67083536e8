import faulthandler
import os
import signal
import time

import pytest

from megapref import signals

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1000"}


def test_signals_are_noted_the_first_one_counts_and_handlers_come_back():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with signals.noted():
        assert signals.asked_to_stop() == 0 and not signals.noted_within(0)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert signals.asked_to_stop() == signal.SIGUSR1 and signals.noted_within(0)
        assert signals.reason(signals.asked_to_stop()) == "SIGUSR1 was received"
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
    assert signals.asked_to_stop() == 0


def test_signals_do_not_change_the_exit_code_of_a_process_that_ends():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    try:
        with pytest.raises(SystemExit), signals.noted(then_ignored=True):
            raise SystemExit(signals.EXIT_CODE)
        for number in signals.SIGNALS:
            os.kill(os.getpid(), number)  # would end this process
    finally:
        for number, handler in zip(signals.SIGNALS, before, strict=True):
            signal.signal(number, handler)


def test_a_deadline_that_has_passed_asks_to_stop():
    assert signals.asked_to_stop(time.time() + 1000) == 0
    assert signals.asked_to_stop(time.time() - 1) == signals.DEADLINE
    assert "time limit" in signals.reason(signals.DEADLINE)


@pytest.mark.parametrize(
    ("before_end", "environment", "deadline"),
    [(None, JOB, None), ("90s", {}, None), ("90s", JOB, 910), ("10m", JOB, 400), ("1h", JOB, -2600)],
)
def test_deadline(before_end, environment, deadline):
    assert signals.deadline(before_end, environment) == deadline


@pytest.mark.parametrize("text", ["10", "10 m", "1:00", "-1m", "m", ""])
def test_what_is_no_length_of_time(text):
    assert signals.seconds(text) is None


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 2030-01-02T03:04:05", time.mktime((2030, 1, 2, 3, 4, 5, 0, 0, -1)) - 60),
        ("echo NONE", None),
        ("echo 'slurm_load_jobs error: down' >&2; exit 1", "slurm_load_jobs error: down"),
        (None, "there is no squeue here"),
    ],
)
def test_end_of_a_job_is_asked_of_squeue(tmp_path, monkeypatch, script, said):
    if script:
        (tmp_path / "squeue").write_text(f'#!/bin/bash\n[ "${{@: -1}}" = 7 ] || exit 2\n{script}\n')
        (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if script else str(tmp_path))
    if isinstance(said, str):
        with pytest.raises(ValueError, match=f"job 7, but {said}; set SLURM_JOB_END_TIME"):
            signals.deadline("1m", {"SLURM_JOB_ID": "7"})
    else:
        assert signals.deadline("1m", {"SLURM_JOB_ID": "7"}) == said


def test_core_prints_no_stacks_of_processes_that_are_asked_to_end():
    import megapref.mcore.generation  # noqa: F401  all of Core that does

    assert not any(map(faulthandler.unregister, (signal.SIGTERM, signal.SIGINT)))
