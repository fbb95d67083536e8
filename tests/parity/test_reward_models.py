"""Reward models against transformers' own forward, one row at a time; once for each node in a world of several."""

import pytest
import torch
from distributed_run import run_distributed
from tiny_models import make_checkpoint
from tiny_tokenizers import CHATML, save_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megapref.batch import Completion, Prompt, is_per_node
from megapref.inference.classifier import batches
from megapref.online.reward_models import sequence_classifier
from megapref.plugins import load_plugin

TEXTS = ["hello", "", "the cat sat on the mat " * 9, "a dog", "two and three are five, good morning"]
PROMPTS = [Prompt([1], "<rendered>", {"prompt": f"what is it {'now ' * i}?"}, i) for i in range(len(TEXTS))]
CHATS = [Prompt([1], "<rendered>", {"prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]}, 0)] * len(TEXTS)
COMPLETIONS = [Completion([2], text, True) for text in TEXTS]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    def model(name, chat_template=None, **changes):
        folder = tmp_path_factory.mktemp("reward")
        save_tokenizer(folder, chat_template=chat_template, bos=chat_template is None)
        vocabulary = len(AutoTokenizer.from_pretrained(folder))
        make_checkpoint(folder, name, scores=True, **{"vocab_size": vocabulary, "num_labels": 1, **changes})
        return str(folder)

    return model


def one_by_one(path, texts, cut=slice(None), add_special_tokens=True):
    """The scores of transformers, each text alone and whole."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    ids = [tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"][cut] for text in texts]
    with torch.no_grad():
        return [model(torch.tensor([one])).logits[0].tolist() for one in ids]


@pytest.mark.parametrize(("name", "max_tokens"), [("llama", 16384), ("llama", 1), ("qwen2", 64)])
def test_scores_equal_transformers_one_by_one(make, name, max_tokens):
    path = make(name)
    want = one_by_one(path, [prompt.row["prompt"] + text for prompt, text in zip(PROMPTS, TEXTS, strict=True)])
    scores = sequence_classifier(PROMPTS, COMPLETIONS, path=path, max_tokens=max_tokens)
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(want)[:, 0], rtol=1e-5, atol=1e-5)
    assert len({round(score, 3) for score in scores}) == len(scores)


def test_the_models_own_template_makes_the_text(make):
    path = make("qwen2", CHATML)
    ends = [f"<|im_start|>assistant\n{text}<|im_end|>\n" for text in TEXTS]
    strings = [f"<|im_start|>user\n{p.row['prompt']}<|im_end|>\n{end}" for p, end in zip(PROMPTS, ends, strict=True)]
    chats = [f"<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n{end}" for end in ends]
    plain = [prompt.row["prompt"] + text for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    for prompts, texts, chat in ((PROMPTS, strings, None), (CHATS, chats, True), (PROMPTS, plain, False)):
        want = one_by_one(path, texts, add_special_tokens=chat is False)
        got = sequence_classifier(prompts, COMPLETIONS, path=path, chat=chat)
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want)[:, 0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"row 0 is a conversation, but .* chat=false"):
        sequence_classifier(CHATS, COMPLETIONS, path=path, chat=False)


def test_the_head_is_read_at_the_last_token_even_when_the_text_ends_with_the_padding_token(make):
    tokenizer_of = AutoTokenizer.from_pretrained(make("llama"))
    path = make("llama", "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}", pad_token_id=tokenizer_of.eos_token_id)
    texts = [f"{prompt.row['prompt']}<|im_end|>{text}<|im_end|>" for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        hidden = [model.model(tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]).last_hidden_state for text in texts]
        want = [model.score(one[0, -1]).item() for one in hidden]
    assert sequence_classifier(PROMPTS, COMPLETIONS, path=path) == pytest.approx(want, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("truncation", "cut"), [("keep_end", slice(-12, None)), ("keep_start", slice(12))])
def test_long_texts_are_cut_at_the_end_that_is_named(make, caplog, truncation, cut):
    path = make("llama")
    want = one_by_one(path, [prompt.row["prompt"] + text for prompt, text in zip(PROMPTS, TEXTS, strict=True)], cut)
    got = sequence_classifier(PROMPTS, COMPLETIONS, path=path, max_length=12, truncation=truncation)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want)[:, 0], rtol=1e-5, atol=1e-5)
    assert "texts were cut to 12 tokens" in caplog.text
    with pytest.raises(ValueError, match=r"prompt row \d: with its completion \d+ tokens, max_length=12"):
        sequence_classifier(PROMPTS, COMPLETIONS, path=path, max_length=12, truncation="error")


def test_the_models_own_limit_counts(make):
    path = make("llama", max_position_embeddings=16)
    want = one_by_one(path, [prompt.row["prompt"] + text for prompt, text in zip(PROMPTS, TEXTS, strict=True)], slice(-16, None))
    assert sequence_classifier(PROMPTS, COMPLETIONS, path=path) == pytest.approx([value for (value,) in want], rel=1e-5, abs=1e-5)


def test_several_labels_and_other_mistakes_are_named(make, tmp_path):
    path = make("qwen2", num_labels=2)
    want = one_by_one(path, [prompt.row["prompt"] + text for prompt, text in zip(PROMPTS, TEXTS, strict=True)])
    assert sequence_classifier(PROMPTS, COMPLETIONS, path=path, label=1) == pytest.approx([row[1] for row in want], rel=1e-5, abs=1e-5)
    for label in (None, 2):
        with pytest.raises(ValueError, match=r"has 2 labels; set parameter label to the number of the one that is the score, 0 to 1"):
            sequence_classifier(PROMPTS, COMPLETIONS, path=path, label=label)
    save_tokenizer(tmp_path)
    make_checkpoint(tmp_path, "qwen2", num_labels=1)
    with pytest.raises(ValueError, match=r"lacks score.weight, which would be random"):
        sequence_classifier(PROMPTS, COMPLETIONS, path=str(tmp_path))
    with pytest.raises(ValueError, match="no sequence classifier with its tokenizer"):
        sequence_classifier(PROMPTS, COMPLETIONS, path=str(tmp_path / "nowhere"))


def test_batches_hold_at_most_the_tokens_and_every_row_once():
    lengths = [5, 100, 7, 1, 30, 31, 2]
    found = list(batches(lengths, 64))
    assert sorted(row for rows in found for row in rows) == list(range(7)) and [1] in found
    assert all(len(rows) * max(lengths[row] for row in rows) <= 64 for rows in found if rows != [1])
    assert list(batches([], 64)) == []


def _scored_on_nodes(nodes, bad):
    """This rank's result of a counting function that is placed on nodes, with a share of rank + 1 rows."""
    import os

    import torch.distributed as dist

    from megapref.config import Parallel
    from megapref.mcore import setup

    setup.start(Parallel(tensor=2), 0)
    os.environ["GROUP_RANK"] = str(nodes[dist.get_rank()])
    calls = []

    def function(numbers, letters):
        calls.append((dist.get_rank(), len(numbers)))
        if bad in numbers:
            raise ValueError(f"{bad} is bad")
        return [f"{letter}{number}" for number, letter in zip(numbers, letters, strict=True)]

    share = setup.data_parallel_rank()
    try:
        values = setup.once_per_node(function)([10 * share + i for i in range(share)], ["x"] * share)
    except ValueError as error:
        values = str(error)
    del os.environ["GROUP_RANK"]
    return values, calls


@pytest.mark.parametrize(
    ("nodes", "calls"),
    [([0, 0, 0, 0], {0: 1}), ([0, 0, 1, 1], {0: 0, 2: 1}), ([0, 1, 1, 1], {0: 0, 2: 1}), ([1, 0, 1, 0], {0: 1})],
)
def test_one_process_of_each_node_scores_for_all_of_it(nodes, calls):
    results = run_distributed(_scored_on_nodes, 4, nodes, -1)
    assert [values for values, _ in results] == [[], [], ["x10"], ["x10"]]  # shares of 0 and of 1 rows, the same on both tensor ranks
    assert {rank: count for _, own in results for rank, count in own} == calls


def test_its_error_is_raised_on_every_rank():
    assert [values for values, _ in run_distributed(_scored_on_nodes, 4, [0, 0, 1, 1], 10)] == ["10 is bad"] * 4


def test_the_reward_is_marked_with_its_parameters_bound():
    assert is_per_node(load_plugin("online.reward_models:sequence_classifier", {"path": "x"}, "reward.rm"))
    assert not is_per_node(load_plugin("online.rewards:length", {"target": 1}, "reward.length"))
