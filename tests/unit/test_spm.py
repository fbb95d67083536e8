"""A SentencePiece model read without SentencePiece gives the same tokens, and says where they lie in the text."""

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import TEXTS

from megapref.data.chat import load_tokenizer, render, tokenize
from megapref.data.rows import Location

HERE = Location("rows.jsonl", 3)
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS = {
    "llama": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 330, **PLAIN},
    "default": {"model_type": "unigram", "vocab_size": 60},
    "unigram with bytes": {"model_type": "unigram", "byte_fallback": True, "vocab_size": 310, "add_dummy_prefix": False, **PLAIN},
}


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "tokenizer.model"
    model = io.BytesIO()
    options = {"hard_vocab_limit": False, "user_defined_symbols": ["<|user|>"], "minloglevel": 2, **KINDS[request.param]}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 4), model_writer=model, **options)
    file.write_bytes(model.getvalue())
    return load_tokenizer(str(file)), sentencepiece.SentencePieceProcessor(model_file=str(file))


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("  abcdehost\ntw?é🙂ﬁ"), min_size=1, max_size=24).filter(lambda text: not text.startswith(" ")))
def test_tokens_are_sentencepieces(both, text):
    tokenizer, plain = both
    assert tokenizer(text).input_ids == [plain.bos_id(), *plain.encode(text)]


def test_eos_text_and_offsets(both):
    tokenizer, plain = both
    assert tokenizer.eos_token_id == plain.eos_id() and tokenizer.bos_token_id == plain.bos_id()
    text = "the cat sat on the mat"
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    assert tokenizer.decode(encoded.input_ids) == text and encoded.offset_mapping[-1][1] == len(text)
    ids = tokenizer("hello<|user|>you</s>", add_special_tokens=False).input_ids
    assert plain.piece_to_id("<|user|>") in ids and ids[-1] == plain.eos_id()


def test_rows_are_split_where_the_prompt_ends(both):
    tokenizer, plain = both
    [row] = tokenize(tokenizer, [render(tokenizer, "the cat", [" sat", " ran"], HERE, {})])
    assert row.prompt_ids == [plain.bos_id(), *plain.encode("the cat")]
    assert row.prompt_ids + row.completion_ids[0] == [plain.bos_id(), *plain.encode("the cat sat"), plain.eos_id()]


def test_a_folder_with_a_model_file_only(both, tmp_path):
    tokenizer, _ = both
    (tmp_path / "tokenizer.model").write_bytes(Path(tokenizer.name_or_path).read_bytes())
    assert load_tokenizer(str(tmp_path))("a dog").input_ids == tokenizer("a dog").input_ids


@pytest.mark.parametrize("content", [b"no model", b"", b"\xff" * 100])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.tokenizer=.*a.model: is not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "a.model"))
