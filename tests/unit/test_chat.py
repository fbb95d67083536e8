import pytest
from tiny_tokenizers import CHATML, save_tokenizer

from megapref.data.chat import load_tokenizer, render, tokenize
from megapref.data.rows import BadRow, Location

HERE = Location("rows.jsonl", 3)
USER, GOOD, BAD = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "the cat"}, {"role": "assistant", "content": "a dog"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("plain")))


def encode(tokenizer, prompt, *completions):
    [(row, prompt_ids, completion_ids, _)] = tokenize(tokenizer, [render(tokenizer, prompt, completions, HERE, {})])
    return row, prompt_ids, completion_ids


@pytest.mark.parametrize("prompt", ["the cat sat", "the ca", "what is ", "hello\n", "é", "🙂"])
@pytest.mark.parametrize("completion", ["t on the mat", " on the mat", "\nsat", "é", "sat on"])
def test_prompt_and_completion_are_the_tokens_of_the_whole_text(tokenizer, prompt, completion):
    _, prompt_ids, sides = encode(tokenizer, prompt, completion, completion + " there")
    for side, text in zip(sides, (completion, completion + " there"), strict=True):
        assert prompt_ids + side == [*tokenizer(prompt + text).input_ids, tokenizer.eos_token_id]
        assert len(tokenizer.decode(prompt_ids)) <= len(prompt)


def test_a_token_across_the_border_is_the_completions(tokenizer):
    whole = tokenizer("the cat").input_ids
    _, prompt_ids, [side, other] = encode(tokenizer, "the c", "at", "x")
    assert whole[-1] not in tokenizer("the c").input_ids, "the border must be merged for this test to say something"
    assert prompt_ids + side == [*whole, tokenizer.eos_token_id] and side[0] == whole[-1]
    assert prompt_ids + other == [*tokenizer("the cx").input_ids, tokenizer.eos_token_id]
    assert prompt_ids == whole[:-1]


def test_eos_is_there_once(tokenizer):
    for text in ("the cat", "the cat<|im_end|>"):
        _, _, [side] = encode(tokenizer, "hello ", text)
        assert side.count(tokenizer.eos_token_id) == 1 and side[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("end", [False, True])
def test_special_tokens_of_the_tokenizer_go_in_front_and_an_added_eos_does_not_end_a_prompt(tmp_path, end):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, bos=True, end=end))
    bare = tokenizer("hello", add_special_tokens=False).input_ids
    assert encode(tokenizer, "hello")[1] == [0, *bare]
    _, prompt_ids, [side, other] = encode(tokenizer, "hello", " the cat", " a dog")
    assert prompt_ids == [0, *bare]
    assert side == [*tokenizer(" the cat", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert other[-1] == tokenizer.eos_token_id and other.count(tokenizer.eos_token_id) == 1


def test_conversations_go_through_the_chat_template_and_end_at_eos(tokenizer):
    row, prompt_ids, [side, other] = encode(tokenizer, [USER], [GOOD], [BAD])
    assert row.prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt_ids) == row.prompt
    assert tokenizer.decode(side) == "the cat<|im_end|>" and tokenizer.decode(other) == "a dog<|im_end|>"
    whole = tokenizer.apply_chat_template([USER, GOOD], tokenize=True, return_dict=False)
    assert prompt_ids + side == whole[: len(prompt_ids) + len(side)]
    assert encode(tokenizer, [USER])[1] == prompt_ids


def test_a_template_with_bos_gets_no_second_one(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, bos=True, chat_template="{{ '<s>' }}" + CHATML))
    _, prompt_ids, _ = encode(tokenizer, [USER], [GOOD])
    assert prompt_ids[0] == 0 and prompt_ids.count(0) == 1


def test_a_template_that_opens_an_answer_otherwise_is_split_where_both_agree(tmp_path):
    thinking = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
    row, _prompt_ids, [_side, _] = encode(load_tokenizer(save_tokenizer(tmp_path, chat_template=thinking)), [USER], [GOOD], [BAD])
    assert row.prompt.endswith("<|im_start|>assistant\n") and row.completions == ("the cat<|im_end|>", "a dog<|im_end|>")


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path):
    counting = "{{ messages | length }}" + CHATML
    with pytest.raises(BadRow, match=r"rows.jsonl, row 3: the chat template changes the prompt"):
        encode(load_tokenizer(save_tokenizer(tmp_path, chat_template=counting)), [USER], [GOOD], [BAD])


def test_a_template_that_refuses_names_the_row(tmp_path):
    refusing = "{{ raise_exception('no system here') }}"
    with pytest.raises(BadRow, match=r"row 3: the chat template refuses the messages \(no system here\)"):
        encode(load_tokenizer(save_tokenizer(tmp_path, chat_template=refusing)), [USER], [GOOD])


def test_a_conversation_without_a_chat_template(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, chat_template=None))
    with pytest.raises(ValueError, match=r"row 3: holds a conversation, but the tokenizer .* has no chat template; use an instruct"):
        encode(tokenizer, [USER])


def test_rows_of_both_kinds_keep_their_order(tokenizer):
    prompts = ["hello", [USER], [USER], "the cat", [USER]]
    rows = list(tokenize(tokenizer, (render(tokenizer, prompt, (), HERE, {"i": i}) for i, prompt in enumerate(prompts))))
    assert [row.columns["i"] for row, *_ in rows] == [0, 1, 2, 3, 4]
    assert [ids for _, ids, *_ in rows] == [encode(tokenizer, prompt)[1] for prompt in prompts]


def test_tokenizers_that_cannot_serve_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"model.tokenizer=.*gone: no such folder, nor a name on the hub"):
        load_tokenizer(str(tmp_path / "gone"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="the folder has no tokenizer that can be loaded"):
        load_tokenizer(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="has no EOS token, so no completion could end; set eos_token"):
        load_tokenizer(save_tokenizer(tmp_path / "endless", eos=None))


TALK = [GOOD, {"role": "user", "content": "and you"}, BAD]


def trained_text(tokenizer, row):
    """The trained tokens of each side, in the runs that they stand in."""
    texts = []
    for ids, mask in zip(row.completion_ids, row.masks, strict=True):
        mask = mask if mask is not None else [True] * len(ids)
        runs = "".join(tokenizer.decode([i]) if trained else "\0" for i, trained in zip(ids, mask, strict=True))
        texts.append([run for run in runs.split("\0") if run])
    return texts


@pytest.mark.parametrize(
    ("train_on", "first"), [("final", ["a dog<|im_end|>"]), ("all_assistant", ["the cat<|im_end|>", "a dog<|im_end|>"])]
)
def test_the_last_or_all_answers_of_a_completion_are_trained(tokenizer, train_on, first):
    [row] = tokenize(tokenizer, [render(tokenizer, [USER], [TALK, [BAD]], HERE, {}, train_on)])
    assert trained_text(tokenizer, row) == [first, ["a dog<|im_end|>"]] and row.masks[1] is None
    assert tokenizer.decode(row.prompt_ids).endswith("<|im_start|>assistant\n")
    whole = tokenizer.apply_chat_template([USER, *TALK], tokenize=True, return_dict=False)
    assert row.prompt_ids + row.completion_ids[0] == whole[: len(row.prompt_ids) + len(row.completion_ids[0])]


def test_all_but_the_answer_of_a_demonstration_is_its_prompt_unless_all_are_trained(tokenizer):
    [row] = tokenize(tokenizer, [render(tokenizer, [USER], [TALK], HERE, {})])
    assert row.masks == [None] and tokenizer.decode(row.completion_ids[0]) == "a dog<|im_end|>"
    [row] = tokenize(tokenizer, [render(tokenizer, [USER], [TALK], HERE, {}, "all_assistant")])
    assert trained_text(tokenizer, row) == [["the cat<|im_end|>", "a dog<|im_end|>"]]


def test_a_template_that_rewrites_earlier_answers_cannot_train_them(tmp_path):
    forgetful = CHATML.replace("m['content']", "(m['content'] if loop.last or m['role'] == 'user' else '...')")
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, chat_template=forgetful))
    with pytest.raises(BadRow, match=r"row 3: the chat template changes an answer when messages follow"):
        render(tokenizer, [USER], [TALK, [BAD]], HERE, {}, "all_assistant")
    [row] = tokenize(tokenizer, [render(tokenizer, [USER], [TALK, [BAD]], HERE, {})])
    assert trained_text(tokenizer, row)[0] == ["a dog<|im_end|>"]


def test_eos_is_trained_where_the_template_writes_none(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, chat_template=CHATML.replace("<|im_end|>\\n", "\\n").replace("<|im_end|>\n", "\n")))
    [row] = tokenize(tokenizer, [render(tokenizer, [USER], [TALK, [BAD]], HERE, {}, "all_assistant")])
    assert row.completion_ids[0][-1] == tokenizer.eos_token_id and row.masks[0][-1]
    assert len(row.masks[0]) == len(row.completion_ids[0])


def test_a_chat_template_from_a_file(tmp_path):
    path = save_tokenizer(tmp_path / "tokenizer", chat_template=None)
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}")
    assert encode(load_tokenizer(path, str(file)), [USER])[0].prompt == "[user] hello "
    file.write_text("{% for m in messages %}\n{{ m.role }")
    with pytest.raises(ValueError, match=r"model.chat_template=.*mine.jinja: line 2 is not Jinja"):
        load_tokenizer(path, str(file))
    file.write_text("{{ raise_exception('system first') }}")
    load_tokenizer(path, str(file))
    with pytest.raises(ValueError, match=r"model.chat_template=.*gone.jinja: cannot be read .*give a Jinja file"):
        load_tokenizer(path, str(tmp_path / "gone.jinja"))
