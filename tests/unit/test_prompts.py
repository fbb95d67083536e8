import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import save_tokenizer

from megapref.batch import Prompt
from megapref.config import Config, Data, Generation, Pack, Source
from megapref.data.chat import load_tokenizer
from megapref.data.mixture import Rows, step_rows
from megapref.data.prompts import load_prompts, prompt_batches, prompt_options
from megapref.data.rows import BadRow

TEXTS = ["the cat", "a dog ran to the old house", "hello"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "answer": i}) + "\n" for i, text in enumerate(TEXTS)))
    return Source(path=str(path))


def test_prompts_have_tokens_text_and_their_rows_columns(tokenizer, source):
    prompts, counts = load_prompts([source], tokenizer)
    assert [(p.text, p.index, p.row["answer"]) for p in prompts] == [(text, i, i) for i, text in enumerate(TEXTS)]
    assert [p.ids for p in prompts] == [tokenizer(text).input_ids for text in TEXTS]
    assert counts == {"data/dropped_rows": 0, "data/filtered_rows": 0, "data/truncated_rows": 0, "data/shortened_rows": 0}


def test_long_prompts_keep_an_end_or_a_start_or_are_refused(tokenizer, source):
    ids = tokenizer(TEXTS[1]).input_ids
    for truncation, kept in (("keep_end", ids[-3:]), ("keep_start", ids[:3])):
        prompts, counts = load_prompts([source], tokenizer, max_prompt_length=3, truncation=truncation)
        assert prompts[1].ids == kept and counts["data/truncated_rows"] == sum(len(tokenizer(t).input_ids) > 3 for t in TEXTS)
    with pytest.raises(BadRow, match=rf"prompts.jsonl, row 2: prompt: {len(ids)} tokens, expected at most 5 \(data.max_prompt_length"):
        load_prompts([source], tokenizer, max_prompt_length=5, truncation="error")
    with pytest.raises(ValueError, match=r"data.truncation='middle' is not known; use keep_end, keep_start or error"):
        load_prompts([source], tokenizer, max_prompt_length=5, truncation="middle")


def test_a_prompt_longer_than_the_pack_is_refused_or_skipped(tokenizer, source):
    with pytest.raises(BadRow, match=r"row 2: prompt: \d+ tokens, but a pack has room for 5 .*raise pack.max_tokens"):
        load_prompts([source], tokenizer, room=5)
    prompts, counts = load_prompts([source], tokenizer, room=5, on_bad_row="skip")
    assert [p.text for p in prompts] == [TEXTS[0], TEXTS[2]] and counts["data/dropped_rows"] == 1
    with pytest.raises(ValueError, match=r"no usable row in .*prompts.jsonl; the first of 3 dropped rows"):
        load_prompts([source], tokenizer, room=0, on_bad_row="skip")


def test_a_prompt_near_the_longest_sequence_is_counted_and_one_without_room_is_bad(tokenizer, source):
    sizes = [len(tokenizer(text).input_ids) for text in TEXTS]
    assert sorted(sizes)[1] < max(sizes)
    prompts, counts = load_prompts([source], tokenizer, max_new_tokens=4, max_length=max(sizes) + 1)
    assert len(prompts) == 3 and counts["data/shortened_rows"] == sum(size + 4 > max(sizes) + 1 for size in sizes) >= 1
    with pytest.raises(BadRow, match=rf"row 2: prompt: {max(sizes)} tokens leave none of {max(sizes)} \(data.max_length, or the model's positions"):
        load_prompts([source], tokenizer, max_new_tokens=4, max_length=max(sizes))
    prompts, counts = load_prompts([source], tokenizer, max_new_tokens=1, max_length=max(sizes), on_bad_row="skip")
    assert [p.text for p in prompts] == [TEXTS[0], TEXTS[2]] and (counts["data/dropped_rows"], counts["data/shortened_rows"]) == (1, 0)


def test_prompts_of_all_kinds_and_sources_in_one_data_set(tokenizer, tmp_path):
    def file(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    system, user = {"role": "system", "content": "the old house"}, {"role": "user", "content": "hello there"}
    questions = file("questions.jsonl", *({"question": text, "answer": text.upper()} for text in TEXTS))
    messages = file("messages.jsonl", {"talk": [system, user], "level": 1}, {"talk": [user], "level": 2}, {"talk": [user], "level": 3})
    asked = [{"role": "system", "content": "it is {answer}"}, {"role": "user", "content": "{question}?"}]
    sources = [
        Source(questions, template={"prompt": "two and {question}: "}, take=2),
        Source(messages, columns={"prompt": "talk"}, take=2),
        Source(questions, template={"prompt": asked}),
    ]
    prompts, counts = load_prompts(sources, tokenizer)
    assert prompts.sizes == (2, 2, 3) and [p.index for p in prompts] == list(range(7)) and set(counts.values()) == {0}
    assert [p.text for p in prompts[:2]] == ["two and the cat: ", "two and a dog ran to the old house: "]
    talks = [[system, user], [user], *([{**asked[0], "content": f"it is {t.upper()}"}, {**asked[1], "content": f"{t}?"}] for t in TEXTS)]
    for prompt, talk in zip(prompts[2:], talks, strict=True):
        assert prompt.text == tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert prompt.ids == tokenizer(prompt.text, add_special_tokens=False).input_ids
    assert [p.row.get("level") for p in prompts] == [None, None, 1, 2, None, None, None]  # rewards see the row's other columns
    assert [p.row.get("answer") for p in prompts] == [*(t.upper() for t in TEXTS[:2]), None, None, *(t.upper() for t in TEXTS)]


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5), st.integers(1, 4))
def test_every_epoch_has_every_row_once_whatever_the_batch(num_rows, batch_size, seed, num_epochs):
    steps = -(-num_rows * num_epochs // batch_size)
    drawn = np.concatenate([step_rows([num_rows], global_batch_size=batch_size, step=s, seed=seed) for s in range(steps)])
    for epoch in range(num_epochs):
        assert sorted(drawn[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_the_order_is_fixed_by_seed_and_changes_with_seed_and_epoch():
    epochs = [step_rows([20], global_batch_size=20, step=step, seed=seed).tolist() for seed in (0, 1) for step in (0, 1)]
    assert len(set(map(tuple, epochs))) == 4
    assert epochs[0] == np.random.Generator(np.random.PCG64([0, 0])).permutation(20).tolist()
    assert step_rows([3], global_batch_size=5, step=1, seed=0, shuffle=False).tolist() == [2, 0, 1, 2, 0]


def test_ranks_share_a_step_and_a_resumed_run_goes_on():
    prompts = Rows([Prompt([i], str(i), {}, i) for i in range(10)], (10,))

    def batches(rank, num_ranks, start_step, steps):
        source = prompt_batches(prompts, global_batch_size=7, rank=rank, num_ranks=num_ranks, seed=3, start_step=start_step)
        return [next(source) for _ in range(steps)]

    alone = batches(0, 1, 0, 6)
    assert [step for step, _ in alone] == list(range(6)) and Counter(len(batch) for _, batch in alone) == {7: 6}
    assert batches(0, 1, 4, 2) == alone[4:]
    for num_ranks in (2, 3, 8):
        shares = [batches(rank, num_ranks, 0, 6) for rank in range(num_ranks)]
        for step, batch in alone:
            merged = [None] * 7
            for rank in range(num_ranks):
                merged[rank::num_ranks] = shares[rank][step][1]
            assert merged == batch


def test_options_filter_and_order_come_from_the_config(tokenizer, source):
    cfg = Config(data=Data(on_bad_row="skip"), generation=Generation(max_new_tokens=4))
    options = prompt_options(cfg, pack_tokens=100, max_length=60)
    assert options["room"] == 92 and prompt_options(dataclasses.replace(cfg, pack=Pack(share_prompt=False)), 100, None)["room"] == 46
    prompts, counts = load_prompts([dataclasses.replace(source, filter_length=True)], tokenizer, **options)
    short = [text for text in TEXTS if len(tokenizer(text).input_ids) <= 3.6]
    assert [p.text for p in prompts] == short and counts["data/filtered_rows"] == len(TEXTS) - len(short) > 0
    assert [p.index for p in prompts] == list(range(len(short)))
