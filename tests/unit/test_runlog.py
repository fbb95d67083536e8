"""The run directory, metrics.jsonl and what the console shows."""

import errno
import io
import json
import os
import resource
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from megapref import display, runlog
from megapref.metrics_file import read_metrics
from megapref.runlog import RunLog, create_run_dir

TRAINING = {"loss": 0.63124, "grad_norm": 1.5, "objective/scores": 0.2311, "rewards/accuracies": 0.7, "perf/tokens_per_s": 3210.4}
EVALUATION = {"eval/win_rate": 0.6149, "eval/win_rate_low": 0.56, "eval/win_rate_high": 0.67, "eval/reward": 0.4}
EVALUATION["eval/reward_opponent"] = 0.1
EVALUATION_ROW = {"prompt": "Say hello.", "policy": "Hello there!", "opponent": "he he", "against": "reference"}
EVALUATION_ROW |= {"score_policy": 0.9, "score_opponent": -0.25, "preference": 1.0}


def open_log(run_dir, *, resumed_at=None, terminal=False, tensorboard=False, **options):
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal)
    return RunLog(run_dir, total_steps=60, resumed_at=resumed_at, tensorboard=tensorboard, console=console, **options)


def printed(log):
    return log._console.file.getvalue()


def lines_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# the run directory


def test_new_run_dir_holds_config_and_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launchers/train.py", "--config-name", "online_dpo", "a=b c"])
    run_dir = create_run_dir(tmp_path / "runs" / "one", "run:\n  seed: 3\n", resume=False)
    assert (run_dir / "config.yaml").read_text() == "run:\n  seed: 3\n"
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["command"] == "launchers/train.py --config-name online_dpo 'a=b c'"
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"python", "git_commit", "git_dirty", "date", "world_size"} < set(environment)


@pytest.mark.parametrize("sign_of_a_run", ["metrics.jsonl", "checkpoints"])
def test_existing_run_is_refused_and_left_alone(tmp_path, sign_of_a_run):
    (tmp_path / "config.yaml").write_text("old\n")
    (tmp_path / sign_of_a_run).mkdir() if sign_of_a_run == "checkpoints" else (tmp_path / sign_of_a_run).write_text("{}\n")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"run\.dir=.* already holds a run; use run\.resume=auto"):
        create_run_dir(tmp_path, "new\n", resume=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "config.yaml").read_text() == "old\n"


def test_resume_keeps_the_first_config_and_adds_those_that_differ(tmp_path):
    create_run_dir(tmp_path, "lr: 1\n", resume=False)
    (tmp_path / "checkpoints").mkdir()
    for text in ("lr: 1\n", "lr: 2\n", "lr: 2\n", "lr: 1\n"):
        create_run_dir(tmp_path, text, resume=True)
    configs = {path.name: path.read_text() for path in tmp_path.glob("config*")}
    assert configs == {"config.yaml": "lr: 1\n", "config.resume-2.yaml": "lr: 2\n", "config.resume-4.yaml": "lr: 1\n"}
    assert len(list(tmp_path.glob("environment*"))) == 5


@pytest.mark.parametrize("resume", [False, True])
def test_start_that_made_no_step_is_set_aside(tmp_path, resume):
    create_run_dir(tmp_path, "bad\n", resume=False)
    create_run_dir(tmp_path, "good\n", resume=resume)
    assert (tmp_path / "config.yaml").read_text() == "good\n"
    assert (tmp_path / "config.unstarted-1.yaml").read_text() == "bad\n"


def test_foreign_config_yaml_is_not_touched(tmp_path):
    (tmp_path / "config.yaml").write_text("of another program\n")
    with pytest.raises(ValueError, match=r"a file is in the way .*config\.yaml.*choose another run\.dir"):
        create_run_dir(tmp_path, "new\n", resume=False)
    assert (tmp_path / "config.yaml").read_text() == "of another program\n"


@pytest.mark.parametrize("below", ["", "deeper/run"])
def test_run_dir_at_or_under_a_file(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run\.dir=.*file.* a file is in the way .*; choose another run\.dir"):
        create_run_dir(tmp_path / "file" / below, "a\n", resume=False)


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "the disk is full; free some space"), (errno.EROFS, "Read-only file system; choose a run.dir that you may")],
)
def test_full_or_read_only_disk(tmp_path, monkeypatch, number, words):
    def refuse(path, text):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(runlog, "_write_new", refuse)
    with pytest.raises(ValueError, match=words):
        create_run_dir(tmp_path / "run", "a\n", resume=False)


# metrics.jsonl


def test_one_object_per_step(tmp_path):
    log = open_log(tmp_path)
    log.write(1, {"loss": torch.tensor(0.5), "val/contain_eos_token": 1})
    assert lines_of(tmp_path) == [{"step": 1, "loss": 0.5, "val/contain_eos_token": 1}]  # there before close
    log.write(2, TRAINING)
    log.close()
    assert lines_of(tmp_path)[1] == {"step": 2} | TRAINING
    with pytest.raises(AssertionError, match="step 2 is written after step 2"):
        log.write(2, TRAINING)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), torch.tensor(float("nan"))])
def test_non_finite_numbers_are_null_in_the_file_and_readable_in_the_console(tmp_path, value):
    log = open_log(tmp_path)
    log.write(1, {"loss": value, "grad_norm": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "grad_norm": 1.0}\n'
    assert f"loss {float(value):.4f}" in printed(log)


@pytest.mark.parametrize(("resumed_at", "kept"), [(3, [0, 1, 2, 3]), (None, []), (9, [0, 1, 2, 3, 4, 5])])
def test_resume_drops_the_lines_that_are_done_again(tmp_path, resumed_at, kept):
    log = open_log(tmp_path)
    for step in range(6):
        log.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed at work
    resumed = open_log(tmp_path, resumed_at=resumed_at)
    assert [line["step"] for line in lines_of(tmp_path)] == kept
    again = range(0 if resumed_at is None else resumed_at + 1, 12)
    for step in again:
        resumed.write(step, {"loss": -1.0})
    assert [line["step"] for line in lines_of(tmp_path)] == kept + list(again)
    assert not list(tmp_path.glob("*.partial"))


def test_killed_truncation_leaves_the_old_file(tmp_path, monkeypatch):
    log = open_log(tmp_path)
    for step in range(4):
        log.write(step, TRAINING)
    before = (tmp_path / "metrics.jsonl").read_text()

    def killed(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(runlog.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        open_log(tmp_path, resumed_at=1)
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("bad", ["nonsense", "[1]", '{"loss": 1}'])
def test_broken_line_is_named(tmp_path, bad):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .*repair or delete the line"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_disk_that_fills_up_during_the_run_is_told(tmp_path):
    log = open_log(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"run\.dir=.*gone: cannot write there"):
        log.write(1, TRAINING)


def test_line_that_only_half_fits_is_taken_back(tmp_path):
    log = open_log(tmp_path, goes_on=True)
    log.write(1, TRAINING)
    before, limits = (tmp_path / "metrics.jsonl").read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        log.write(2, TRAINING)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert "cannot write there, File too large; training goes on without what was to be written" in printed(log)
    log.write(3, TRAINING)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 3]


# the console


def test_plain_lines(tmp_path, monkeypatch):
    clock = iter([100.0, 123.375, 125.5])
    monkeypatch.setattr(runlog, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    log = open_log(tmp_path)
    log.write(0, EVALUATION)
    log.write(11, TRAINING)
    log.write(12, TRAINING)
    assert printed(log).splitlines() == [
        "evaluation at step 0: win rate 0.61 (0.56 to 0.67), reward +0.40 (opponent +0.10)",
        "step 11/60  loss 0.6312  reward +0.23  win rate 0.61  tokens/s 3,210  left 1:44",
        "step 12/60  loss 0.6312  reward +0.23  win rate 0.61  tokens/s 3,210  left 1:42",
    ]


def test_only_columns_that_exist_are_shown(tmp_path):
    log = open_log(tmp_path)
    log.write(1, {"loss": 2.0})
    assert printed(log) == "step 1/60  loss 2.0000  left ?\n"
    assert dict(display.progress_fields({"loss": 1.0, "rewards/accuracies": 0.5})) == {"loss": "1.0000", "accuracy": "0.50"}


def test_resumed_run_knows_the_last_win_rate(tmp_path):
    log = open_log(tmp_path)
    log.write(1, TRAINING | {"eval/win_rate": 0.75})
    log.write(2, TRAINING | {"eval/win_rate": 0.95})
    resumed = open_log(tmp_path, resumed_at=1)
    resumed.write(2, TRAINING)
    assert "win rate 0.75" in printed(resumed)


def test_terminal_shows_a_live_bar_with_messages_above(tmp_path):
    log = open_log(tmp_path, terminal=True)
    log.write(12, TRAINING | EVALUATION)
    log.message("3 rows [red]were[/red] dropped")
    log.close()
    log.close()
    assert "step 12/60" in printed(log)
    assert "━" in printed(log)
    assert "3 rows [red]were[/red] dropped" in printed(log)


@given(st.integers(0, 10**6))
def test_durations_read_back(seconds):
    parts = [int(part) for part in display.format_duration(seconds).split(":")]
    assert sum(part * 60**place for place, part in enumerate(reversed(parts))) == seconds
    assert len(parts) == (3 if seconds >= 3600 else 2)
    assert all(part < 60 for part in parts[1:])


def test_summary_tells_how_it_went_and_where_everything_is(tmp_path):
    run_dir = create_run_dir(tmp_path / "my run", "a\n", resume=False)
    log = open_log(run_dir)
    log.write(0, EVALUATION | {"eval/win_rate": 0.5})
    log.write(1, {"loss": 0.6931})
    log.write(2, {"loss": float("nan")} | EVALUATION)
    log.samples(2, [EVALUATION_ROW | {"policy": "Hello [b]there[/b]\n\x1b[31mfriend"}])
    (run_dir / "hf").mkdir()
    log.summary()
    text = printed(log)
    for words in ("0.6931      nan   1 to 2", "0.500    0.615   0 to 2", "Hello [b]there[/b]", "score +0.90", "score -0.25", "he he"):
        assert words in text
    assert f"{run_dir}/config.yaml" in text
    assert f"python tools/generate.py '{run_dir}/hf'" in text
    assert "checkpoints" not in text  # there are none
    assert "\x1b" not in text


# samples, TensorBoard, Weights & Biases, other ranks


def test_samples_of_training_and_evaluation_go_to_files_of_their_own(tmp_path):
    log = open_log(tmp_path)
    row = {"prompt": "é\ud800", "first": "a", "second": "b", "score_first": 1.5, "score_second": None, "preference": None}
    log.samples(10, [row | {"score_first": torch.tensor(1.5), "score_second": float("nan")}, row])
    log.samples(10, [EVALUATION_ROW])
    log.samples(20, [])
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["evaluation_000010.jsonl", "step_000010.jsonl"]
    lines = (tmp_path / "samples" / "step_000010.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert "é" in lines[0]
    assert json.loads(lines[0]) == row


def test_markdown_table_keeps_its_cells():
    table = display.markdown_table([{"prompt": "a|b\n<|end|>", "first": "x"}])
    assert table.splitlines() == ["| prompt | first |", "| --- | --- |", "| a&#124;b<br>&lt;&#124;end&#124;&gt; | x |"]


def test_tensorboard_gets_scalars_and_samples(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = open_log(tmp_path, tensorboard=True)
    log.write(1, TRAINING)
    log.write(2, TRAINING | {"loss": 0.25})
    log.samples(2, [EVALUATION_ROW])
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, round(event.value, 4)) for event in events.Scalars("loss")] == [(1, 0.6312), (2, 0.25)]
    assert "samples/evaluation/text_summary" in events.Tags()["tensors"]


def test_wandb_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log\.wandb=project needs the wandb package; pip install wandb"):
        open_log(tmp_path, wandb="project")


def test_wandb_gets_every_step(tmp_path, monkeypatch):
    logged, started = [], []
    run = types.SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics)), finish=lambda: logged.append("finished"))
    fake = types.SimpleNamespace(init=lambda **options: started.append(options) or run, Table=lambda columns, data: (columns, data))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = open_log(tmp_path, wandb="project", resumed_at=4)
    log.write(5, TRAINING)
    log.samples(5, [EVALUATION_ROW | {"score_policy": torch.tensor(0.5)}] * 40)
    log.close()
    assert started[0]["project"] == "project"
    assert started[0]["resume"] == "auto"
    table = list(EVALUATION_ROW), [list((EVALUATION_ROW | {"score_policy": 0.5}).values())] * 16
    assert logged == [(5, TRAINING), (5, {"samples/evaluation": table}), "finished"]


def test_other_ranks_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None, total_steps=3)
    log.write(1, TRAINING)
    log.samples(1, [EVALUATION_ROW])
    log.message("hello")
    log.summary()
    log.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""
