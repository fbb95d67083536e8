"""tools/inspect_batch.py: the runs of a pack, the bars, the reasons of dropped rows, and the whole output."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import save_tokenizer

from megapref.batch import TokenCompletion, TokenPair
from megapref.data.packing import pack

spec = importlib.util.spec_from_file_location("inspect_batch", Path(__file__).resolve().parents[2] / "tools" / "inspect_batch.py")
inspect_batch = sys.modules["inspect_batch"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(inspect_batch)

PAIRS = [TokenPair([1, 2, 3], [4, 5], [6, 7, 8], 0.25), TokenPair([9], [10]), TokenPair([11, 12], [13], [14])]


def runs(batch):
    return [(run.row, run.side, run.is_trained, batch.token_ids_T[run.start : run.end].tolist(), run.prefix) for run in inspect_batch.runs_of(batch)]


def test_runs_with_a_shared_prompt():
    [[batch]] = pack(PAIRS, max_tokens=64, pad_multiple=8)
    assert runs(batch) == [
        (0, None, False, [1, 2, 3], None),
        (0, 0, True, [4, 5], None),
        (0, 1, True, [6, 7, 8], (0, 3)),
        (1, None, False, [9], None),
        (1, 0, True, [10], None),
        (2, None, False, [11, 12], None),
        (2, 0, True, [13], None),
        (2, 1, True, [14], (10, 12)),
    ]


def test_runs_with_the_prompt_twice():
    [[batch]] = pack(PAIRS[:1], max_tokens=64, share_prompt=False)
    assert [run[:4] for run in runs(batch)] == [
        (0, None, False, [1, 2, 3]),
        (0, 0, True, [4, 5]),
        (0, None, False, [1, 2, 3]),
        (0, 1, True, [6, 7, 8]),
    ]


def test_what_is_not_trained_of_a_completion_is_a_run_of_its_own():
    [[batch]] = pack(PAIRS[:1], max_tokens=64)
    kept = (batch.target_ids_K != 7) & (batch.target_ids_K != 4)
    batch = replace(batch, query_index_K=batch.query_index_K[kept], target_ids_K=batch.target_ids_K[kept], cell_K=batch.cell_K[kept])
    assert [run[1:4] for run in runs(batch)] == [
        (None, False, [1, 2, 3]),
        (0, False, [4]),
        (0, True, [5]),
        (1, True, [6]),
        (1, False, [7]),
        (1, True, [8]),
    ]


def test_runs_of_single_completions():
    [[batch]] = pack([TokenCompletion([1, 2], [3, 4], True), TokenCompletion([5], [6, 7], False, mask=[False, True])], max_tokens=64)
    assert [run[:4] for run in runs(batch)] == [
        (0, None, False, [1, 2]),
        (0, 0, True, [3, 4]),
        (1, None, False, [5, 6]),  # what comes before the first trained token is not told from the prompt
        (1, 1, True, [7]),
    ]


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=50))
def test_bars_count_every_length_once(lengths):
    lines = inspect_batch.histogram(lengths)
    assert len(lines) <= 10 and sum(int(line.split()[-1]) for line in lines) == len(lengths)
    assert lines[0].split()[0] == str(min(lengths)) and lines[-1].split()[2] == str(max(lengths))
    assert max(line.count("█") for line in lines) == 40
    for line in lines:
        low, _, high, *_, number = line.split()
        assert int(number) == sum(int(low) <= length <= int(high) for length in lengths)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current directory with a recipe, a tokenizer and rows: a pair, one without its key, a tie, a long one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    rows = [
        {"prompt": "the cat", "chosen": " sat\non it", "rejected": " ran", "score_chosen": 2, "score_rejected": 1},
        {"prompt": "the cat"},
        {"context": "the cat", "response1": "a", "response2": "b", "overall_preference": 0},
        {"prompt": "the cat sat on the mat and it was a good dog", "chosen": "a", "rejected": "b"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "small.yaml").write_text(
        "model: {path: model}\nloss: {function: losses:dpo, params: {beta: 0.1}}\nmethod: {pairs: offline}\n"
        "train: {global_batch_size: 2}\ngeneration: {max_new_tokens: 8}\ndata: {train: [{path: rows.jsonl, filter_length: true}]}\n"
    )
    return tmp_path


def shown(capsys, *arguments):
    status = inspect_batch.main(["--config-name", "small", "--config-dir", "mine", *arguments])
    return status, capsys.readouterr()


def test_pairs_are_shown_as_the_model_gets_them(folder, capsys):
    status, output = shown(capsys)
    assert status == 0 and "\x1b" not in output.out
    assert "Rows: 1 dropped, 1 filtered, 0 truncated, 1 tied" in output.out
    for reason in ("row 2: has the keys ['prompt']", "row 3: overall_preference: is 0", "row 4: prompt: ", "over 0.9 * generation"):
        assert reason in output.out
    assert "Training stops at such a row: data.on_bad_row=error, data.ties=error." in output.out
    for line in ("Step 0: pairs 2, packs 1", " pair 1: preference 1, score_first 2, score_second 1", " sat⏎on it<|im_end|>", "attends to 0-"):
        assert line in output.out


def test_completions_of_a_loss_without_pairs(folder, capsys):
    rows = [{"prompt": "the cat", "completion": " sat on it", "label": True}, {"prompt": "a dog", "completion": " ran", "label": False}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "p", "completion": "c", "label": 2}]))
    status, output = shown(capsys, "loss.function=losses:kto")
    assert status == 0 and "Sources: 2 completions" in output.out and "row 3: label: " in output.out
    lines = ("Tokens of desirable completions", "Tokens of undesirable completions", "Step 0: completions 2", " completion 1", "undesirable tokens")
    for line in (*lines, " sat on it<|im_end|>"):
        assert line in output.out


def test_prompts_of_an_online_recipe(folder, capsys):
    status, output = shown(capsys, "method.pairs=online", "reward.a.function=online.rewards:sentiment", "--step", "2")
    assert status == 0 and "Sources: 2 prompts" in output.out
    assert "Step 2: 2 prompts" in output.out and "tokens  the cat" in output.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.train=[{path: gone.jsonl}]"], "inspect_batch: data.train[0].path=\"gone.jsonl\": there is no such file"),
        (["model.tokenizer=mine"], "inspect_batch: model.tokenizer=mine: the folder has no tokenizer"),
        (["data.max_lenght=3"], "inspect_batch: data.max_lenght: unknown key; did you mean data.max_length?"),
    ],
)
def test_mistakes_are_named(folder, capsys, arguments, message):
    status, output = shown(capsys, *arguments)
    assert status == 2 and output.err.startswith(message)
