"""Stop strings: a completion ends with the token that brings the first of them, wherever tokens are cut."""

import io

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import TEXTS, save_tokenizer
from transformers import AutoTokenizer

from megapref.batch import Prompt
from megapref.config import Generation
from megapref.data.chat import load_tokenizer
from megapref.inference.engine import make_generate
from megapref.inference.stopping import ends_with_stop


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def first_end(ends, ids) -> int | None:
    return next((n for n in range(1, len(ids) + 1) if ends(ids[:n])), None)


@pytest.mark.parametrize("stop", [[" the "], ["é"], ["\nUser:", "house"], ["<|im_start|>"], ["t", "on the mat"]], ids=str)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_end_is_where_the_whole_text_first_has_a_stop_string(tokenizer, stop, data):
    pieces = st.sampled_from([*"abceéo \n", " the", "the house", "\nUser", ":", " on the mat", "<|im_start|>", "日本"])
    ids = tokenizer("".join(data.draw(st.lists(pieces, max_size=30))))["input_ids"]
    ids = [token for token in ids for _ in range(data.draw(st.integers(0, 2)))]  # also what no text is tokenised to
    texts = [tokenizer.decode(ids[:n]) for n in range(1, len(ids) + 1)]
    expected = next((n for n, text in enumerate(texts, 1) if any(one in text for one in stop)), None)
    assert first_end(ends_with_stop(tokenizer, stop), ids) == expected


def test_a_stop_string_may_span_tokens_and_end_inside_one(tokenizer):
    ids = tokenizer("a cat on the mat")["input_ids"]
    spanning = first_end(ends_with_stop(tokenizer, ["t on"]), ids)
    assert tokenizer.decode(ids[:spanning]).endswith("t on") and spanning < len(ids)
    inside = first_end(ends_with_stop(tokenizer, [" o"]), ids)
    assert tokenizer.decode(ids[:inside]) == "a cat on"


def test_spaces_of_sentencepiece_count(tmp_path):
    model = io.BytesIO()
    kind = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 330, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 4), model_writer=model, **kind)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.model"))
    ids = tokenizer("the cat sat", add_special_tokens=False)["input_ids"]
    ends = ends_with_stop(tokenizer, [" sat"])
    assert first_end(ends, ids) == len(ids)
    assert not ends(ids[: len(ids) - 1])


def test_completions_end_with_it_and_keep_it(tokenizer):
    written = [tokenizer(text)["input_ids"] for text in ("the cat sat on the mat", "hello there<|im_end|>", "a dog ran")]

    def engine(prompts, draw, max_new_tokens, stop_id, ends):
        assert stop_id == tokenizer.eos_token_id and max_new_tokens == [29, 28, 27]
        return [ids[: first_end(ends, ids)] for ids in written]

    generate = make_generate({"policy": engine}, Generation(max_new_tokens=30, stop=["on t"]), tokenizer, 0, 30)
    made = generate([Prompt([5] * (1 + index), "", {}, index) for index in range(3)], "policy", step=0, side=0)
    assert [(one.text, one.finished) for one in made] == [("the cat sat on the", True), ("hello there", True), ("a dog ran", False)]
    assert [tokenizer.decode(one.ids) for one in made] == ["the cat sat on the", "hello there<|im_end|>", "a dog ran"]


def test_without_stop_strings_nothing_is_asked(tokenizer):
    assert ends_with_stop(tokenizer, []) is None
