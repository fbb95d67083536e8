"""The ledger's files: written whole, set aside, read back as pairs and as single completions, with the same and with another tokenizer."""

from pathlib import Path

import pytest
from tiny_tokenizers import save_tokenizer

from megapref.batch import Comparison, Completion, Contest, Prompt, TokenPair
from megapref.config import Source
from megapref.data import ledger
from megapref.data.chat import load_tokenizer, render, tokenize
from megapref.data.offline import load_pairs
from megapref.data.rows import Location

CHAT = [{"role": "system", "content": "be short"}, {"role": "user", "content": "the cat?"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def prompt_of(tokenizer, value, index: int) -> Prompt:
    (row,) = tokenize(tokenizer, [render(tokenizer, value, (), Location("rows", 1), {"prompt": value, "extra": 1})])
    return Prompt(row.prompt_ids, row.row.prompt, row.row.columns, index)


def sample(tokenizer, text: str, finished: bool = True) -> Completion:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Completion([*ids, tokenizer.eos_token_id] if finished else ids[::-1], text, finished)  # as no tokenizer would have made it


def contests_of(tokenizer) -> list[Contest]:
    samples = [sample(tokenizer, " sat on", finished=False), sample(tokenizer, " ran"), sample(tokenizer, " ran")]
    chat = [sample(tokenizer, "it is"), sample(tokenizer, "the mat", finished=False)]
    said = Comparison(0, 1, 0.25, "B \ud800", True)
    return [
        Contest(prompt_of(tokenizer, "the dog", 4), samples, ("policy",) * 3, [1.0, None, 0.5], [said, Comparison(1, 2, 1.0, None, False)]),
        Contest(prompt_of(tokenizer, CHAT, 0), chat, ("policy", "reference"), [0.5, 0.5], [Comparison(0, 1, 0.5, None, True)]),
        Contest(prompt_of(tokenizer, "what", 1), chat, ("policy", "reference"), [None, None], [Comparison(0, 1, None, "?", False)]),
    ]


def pairs_of(contests: list[Contest], first_only: bool = False) -> list[TokenPair]:
    return [
        TokenPair(own.prompt.ids, own.candidates[c.first].ids, () if first_only else own.candidates[c.second].ids, c.preference)
        for own in contests
        for c in own.comparisons
        if c.trained
    ]


def write(folder, tokenizer, step: int = 1, first_only: bool = False) -> list[TokenPair]:
    contests = contests_of(tokenizer)
    pairs = pairs_of(contests, first_only)
    of_step = {"step": step, "weight_version": step - 1, "seed": 0, "tokenizer": ledger.vocabulary_digest(tokenizer)}
    ledger.write_step(folder, contests, pairs, **of_step)
    return pairs


def load(folder, tokenizer, **options):
    pairs, counts = load_pairs([Source(path=str(folder))], tokenizer, **options)
    return [(list(p.prompt_ids), list(p.first_ids), list(p.second_ids), p.preference) for p in pairs], counts


def plain(pairs: list[TokenPair]):
    return [(list(p.prompt_ids), list(p.first_ids), list(p.second_ids), p.preference) for p in pairs]


def test_rows_have_everything(tmp_path, tokenizer):
    write(tmp_path / "ledger", tokenizer)
    rows = ledger.read_step(tmp_path / "ledger", 1)
    assert [row["number"] for row in rows] == [0, 1, 2, 3] and [row["prompt_index"] for row in rows] == [4, 4, 0, 1]
    assert rows[0]["prompt"] == "the dog" and rows[0]["messages"] is None and rows[2]["prompt"] is None and rows[2]["messages"] == CHAT
    assert rows[2]["prompt_text"].startswith("<|im_start|>system\nbe short") and rows[2]["second_model"] == "reference"
    assert (rows[0]["first_score"], rows[0]["second_score"], rows[0]["preference"], rows[0]["judge"]) == (1.0, None, 0.25, "B ?")
    assert [row["trained"] for row in rows] == [True, False, True, False] and (rows[1]["first_side"], rows[1]["second_side"]) == (1, 2)
    assert [path.name for path in (tmp_path / "ledger").iterdir()] == ["step_000001.parquet"]


def test_pairs_come_back_token_for_token(tmp_path, tokenizer):
    pairs = write(tmp_path / "ledger", tokenizer)
    assert plain(ledger.trained_pairs(ledger.read_step(tmp_path / "ledger", 1))) == plain(pairs)
    read, counts = load(tmp_path / "ledger", tokenizer)
    assert read == plain(pairs) and counts["data/dropped_rows"] == 1  # the one without a verdict
    every, _ = load(tmp_path / "ledger", tokenizer, pairing="all")
    assert len(every) == 3 and every[1][1] == every[1][2]  # two equal samples are a pair, too
    (one, _) = load(tmp_path / "ledger" / "step_000001.parquet", tokenizer)
    assert one == read


def test_limits_apply_to_them(tmp_path, tokenizer):
    write(tmp_path / "ledger", tokenizer)
    read, counts = load(tmp_path / "ledger", tokenizer, max_completion_length=1)
    assert {len(side) for pair in read for side in pair[1:3]} == {1} and counts["data/truncated_rows"] == 2


def test_second_that_only_judged(tmp_path, tokenizer):
    pairs = write(tmp_path / "ledger", tokenizer, first_only=True)
    assert plain(ledger.trained_pairs(ledger.read_step(tmp_path / "ledger", 1))) == plain(pairs) and not pairs[0].second_ids
    assert load(tmp_path / "ledger", tokenizer)[0] == plain(pairs_of(contests_of(tokenizer)))


def test_another_tokenizer_reads_the_texts(tmp_path, tokenizer):
    other = load_tokenizer(save_tokenizer(tmp_path / "other"))
    other.add_tokens(["zebra"])
    write(tmp_path / "ledger", tokenizer)
    (standard, chat), _ = load(tmp_path / "ledger", other)
    assert [other.decode(ids) for ids in standard[:3]] == ["the dog", " sat on", " ran<|im_end|>"] and standard[3] == 0.25
    prompt, first, second = (other.decode(ids) for ids in chat[:3])
    assert prompt == other.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert (first, second, chat[3]) == ("it is<|im_end|>", "the mat", 0.5)  # what had not ended has no end


def test_single_completions(tmp_path, tokenizer):
    write(tmp_path / "ledger", tokenizer)
    rows, counts = load_pairs([Source(path=str(tmp_path / "ledger"))], tokenizer, unpaired=True)
    (pair, _) = pairs_of(contests_of(tokenizer))
    assert [(list(row.ids), row.desirable) for row in rows] == [(pair.first_ids, False), (pair.second_ids, True)]
    assert counts["data/dropped_rows"] == 2  # the tie and the one without a verdict


def test_a_folder_is_read_in_order_and_taken_from(tmp_path, tokenizer):
    for step in (10, 2):
        write(tmp_path / "ledger", tokenizer, step)
    (tmp_path / "ledger" / "unused").mkdir()
    write(tmp_path / "ledger" / "unused", tokenizer, 3)
    assert len(load(tmp_path / "ledger", tokenizer)[0]) == 4
    pairs, _ = load_pairs([Source(path=str(tmp_path / "ledger"), take=5)], tokenizer)
    assert len(pairs) == 3


def test_steps_that_are_done_again_are_set_aside(tmp_path, tokenizer):
    for step in (1, 2, 3):
        write(tmp_path, tokenizer, step)
    (tmp_path / ".step_000004.parquet.partial").write_bytes(b"killed")
    assert ledger.set_aside_after(tmp_path, 1) == 2
    write(tmp_path, tokenizer, 2)
    assert ledger.set_aside_after(tmp_path, 1) == 1
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert names == ["step_000001.parquet", "unused/step_000002.parquet", "unused/step_000002_1.parquet", "unused/step_000003.parquet"]
    assert ledger.set_aside_after(tmp_path / "none", 0) == 0


def test_a_kill_while_writing_leaves_no_file(tmp_path, tokenizer, monkeypatch):
    def killed(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(ledger.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "ledger", tokenizer)
    assert not list((tmp_path / "ledger").glob("*.parquet"))


@pytest.mark.parametrize("content", [None, b"not parquet"])
def test_a_step_that_cannot_be_read(tmp_path, content):
    if content:
        (tmp_path / "step_000007.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"step_000007\.parquet: the ledger of step 7 cannot be read .*log\.ledger=true"):
        ledger.read_step(tmp_path, 7)


def test_every_column_is_documented():
    text = (Path(__file__).resolve().parents[2] / "docs" / "ledger.md").read_text()
    assert [name for name in ledger.SCHEMA.names if not name.startswith("second_") and f"`{name}`" not in text] == []
