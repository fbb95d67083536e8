"""The store of cached log-probabilities: what is written is read again bit for bit, and what was spoilt is not read."""

import json
from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megapref.batch import TokenCompletion, TokenPair
from megapref.data.packing import pack
from megapref.data.reference_cache import check_shards, key_of, model_folder, read_shards, write_meta, write_shard

PAIR = TokenPair([1, 2], [3, 4], [5])
KEYS = st.binary(min_size=16, max_size=16)
ENTRIES = st.dictionaries(KEYS, st.lists(st.floats(width=32, allow_nan=False), max_size=5), min_size=1, max_size=8)


@given(first=ENTRIES, second=ENTRIES, unwanted=KEYS)
def test_what_is_written_is_read_bit_for_bit(tmp_path_factory, first, second, unwanted):
    folder = tmp_path_factory.mktemp("cache") / "model"
    second = {key: row for key, row in second.items() if key not in first}
    for entries in filter(None, (first, second)):
        write_shard(folder, entries)
    shards, spoilt = check_shards(folder)
    wanted = {*first, *second} - {unwanted}
    expected = {key: array("f", row) for key, row in {**first, **second}.items() if key in wanted}
    assert read_shards(shards, wanted) == expected and spoilt == []
    write_shard(folder, first)
    assert check_shards(folder) == (shards, [])  # the same rows are the same file


@pytest.mark.parametrize("spoil", [lambda old: old[:-7], lambda old: old[:40] + bytes([old[40] ^ 1]) + old[41:], lambda _: b""])
def test_a_shard_that_changed_is_told_apart(tmp_path, spoil):
    good, bad = (write_shard(tmp_path, {bytes([i]) * 16: [-1.5, -2.5]}) for i in range(2))
    bad.write_bytes(spoil(bad.read_bytes()))
    (tmp_path / f".{good.name}.left_by_a_kill").write_bytes(b"half")
    assert check_shards(tmp_path) == ([good], [bad])


def test_an_empty_cache(tmp_path):
    assert check_shards(tmp_path / "none") == ([], []) and read_shards([], {b"x"}) == {}


def test_keys_tell_tokens_borders_and_masks_apart():
    others = [
        TokenPair([1, 2], [3, 4], [5, 6]),
        TokenPair([1], [2, 3, 4], [5]),
        TokenPair([1, 2], [3], [4, 5]),
        TokenPair([1, 2], [5], [3, 4]),
        TokenPair([1, 2], [3, 4], [5], first_mask=[True, False]),
        TokenPair([1, 2], [3, 4], [5], first_mask=[False, True]),
        TokenPair([1, 2], [3, 4]),
    ]
    assert len({key_of(pair) for pair in [PAIR, *others]}) == 1 + len(others)
    same = TokenPair(array("i", [1, 2]), array("i", [3, 4]), array("i", [5]), preference=0.3, extras={"score": 1.0}, ref_logps=[0.0] * 3)
    assert key_of(same) == key_of(PAIR)
    assert key_of(TokenCompletion([1, 2], [3, 4], desirable=False)) == key_of(TokenPair([1, 2], [3, 4]))


def test_another_model_or_type_has_another_folder(tmp_path):
    def folder_of(model: str, weights: bytes, dtype: str = "fp32"):
        (tmp_path / model).mkdir(exist_ok=True)
        (tmp_path / model / "config.json").write_text("{}")
        (tmp_path / model / "model.safetensors").write_bytes(weights)
        return model_folder(tmp_path / "cache", tmp_path / model, dtype)

    weights = bytes(2**21)
    folder = folder_of("a", weights)
    assert folder == folder_of("copy", weights) and folder.parent == tmp_path / "cache"
    assert len({folder, folder_of("b", b"\1" + weights[1:]), folder_of("a", weights, "bf16")}) == 3


def test_the_note_for_people_is_of_the_first_fill(tmp_path):
    for name in ("first", "second"):
        write_meta(tmp_path / "model", {"model": name})
    assert json.loads((tmp_path / "model" / "meta.json").read_text()) == {"model": "first"}


def test_known_log_probabilities_are_laid_out_as_their_tokens():
    masked = TokenPair([1], [7, 8, 9], [6], first_mask=[False, True, True], ref_logps=array("f", [-1, -2, -3]))
    pairs = [TokenPair(PAIR.prompt_ids, PAIR.first_ids, PAIR.second_ids, ref_logps=[-4.0, -5.0, -6.0]), masked]
    [[batch]] = pack(pairs, max_tokens=64)
    assert batch.target_ids_K.tolist() == [3, 4, 5, 8, 9, 6] and batch.ref_logps_K.tolist() == [-4, -5, -6, -1, -2, -3]
    assert batch.ref_logps_K.dtype == torch.float32
    completion = TokenCompletion([1], [7, 8], desirable=True, ref_logps=[-1.0, -2.0])
    [[batch]] = pack([completion], max_tokens=64)
    assert batch.ref_logps_K.tolist() == [-1, -2]
    with pytest.raises(AssertionError, match="1 of 2 pairs of a pack have no log-probabilities of the reference"):
        pack([PAIR, masked], max_tokens=64)
    with pytest.raises(AssertionError, match="2 log-probabilities of the reference for 3 trained tokens"):
        pack([TokenPair(PAIR.prompt_ids, PAIR.first_ids, PAIR.second_ids, ref_logps=[-4.0, -5.0])], max_tokens=64)
