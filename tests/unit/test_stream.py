"""Pairs read while training: the same whatever the ranks, every row once a pass, in proportion to weights; bad rows as elsewhere."""

import json
import threading
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import save_tokenizer

from megapref.config import Source
from megapref.data.chat import load_tokenizer
from megapref.data.rows import BadRow
from megapref.data.stream import Stream, ahead, digest_of, shuffled, stream_pairs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=None))


@pytest.fixture
def make(tmp_path, tokenizer):
    """`make(sizes)`: a stream of files with that many rows; row i of file f has the prompt "f i"."""

    def stream(*sizes, weights=None, buffer=4, check=lambda rows: None, broken=(), **options):
        sources = []
        for number, size in enumerate(sizes):
            path = tmp_path / f"{number}.jsonl"
            rows = [{"prompt": f"{number} {i}", "chosen": " yes", "rejected": " no"} for i in range(size)]
            path.write_text("".join("{}\n" if i in broken else json.dumps(row) + "\n" for i, row in enumerate(rows)))
            sources.append(Source(str(path), weight=weights[number] if weights else None))
        return Stream(sources, tokenizer, options, buffer, check)

    return stream


def steps(stream, number, *, size=4, rank=0, num_ranks=1, **options):
    return list(islice(stream_pairs(stream, global_batch_size=size, rank=rank, num_ranks=num_ranks, seed=7, **options), number))


def prompts(batches, tokenizer):
    return [tokenizer.decode(list(pair.prompt_ids)) for batch in batches for pair in batch.pairs]


def test_every_row_once_a_pass_in_another_order_each_time(make, tokenizer):
    read = prompts(steps(make(7, 5), 9), tokenizer)
    expected = {f"0 {i}" for i in range(7)} | {f"1 {i}" for i in range(5)}
    passes = [read[i : i + 12] for i in range(0, 36, 12)]
    assert [set(one) for one in passes] == [expected] * 3 and len({tuple(one) for one in passes}) == 3


def test_without_shuffling_the_order_of_the_files(make, tokenizer):
    assert prompts(steps(make(3, 2), 2, size=5, shuffle=False), tokenizer) == ["0 0", "0 1", "0 2", "1 0", "1 1"] * 2


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_share_what_one_would_read(make, tokenizer, num_ranks):
    whole = steps(make(11), 5)
    shares = [steps(make(11), 5, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    for step, batch in enumerate(whole):
        for rank in range(num_ranks):
            assert shares[rank][step].pairs == batch.pairs[rank::num_ranks] and shares[rank][step].step == step


def test_a_resumed_run_goes_on_where_it_was(make):
    whole, rest = steps(make(11, 3), 6), steps(make(11, 3), 3, start_step=3)
    assert rest == whole[3:]


def test_weights_are_proportions_and_a_small_source_begins_anew(make, tokenizer):
    read = prompts(steps(make(40, 3, weights=[3.0, 1.0]), 10), tokenizer)
    assert Counter(name.split()[0] for name in read) == {"0": 30, "1": 10}
    assert sorted(Counter(name for name in read if name.startswith("1")).values()) == [3, 3, 4]


def test_bad_rows_stop_the_run_or_are_counted_so_far(make):
    with pytest.raises(BadRow, match=r"0.jsonl, row 3: "):
        steps(make(6, broken=[2]), 2)
    batches = steps(make(6, broken=[2], on_bad_row="skip"), 3, size=5)
    assert [batch.sums["data/dropped_rows"] for batch in batches][-1] == (3.0, 1.0)
    with pytest.raises(ValueError, match=r"data: no usable row in .*0.jsonl; the first of 2 dropped rows: .*row 1"):
        steps(make(2, broken=[0, 1], on_bad_row="skip"), 1)


def test_what_does_not_fit_the_model_stops_the_run(make):
    def refuse(rows):
        raise ValueError("too long for the model")

    for read in (lambda stream: steps(stream, 1), digest_of):
        with pytest.raises(ValueError, match="too long for the model"):
            read(make(5, check=refuse))


def test_digest_tells_streams_apart(make):
    first = digest_of(make(5))
    assert first == digest_of(make(5))
    others = [digest_of(make(5, buffer=5)), digest_of(make(5, max_length=9)), digest_of(make(6)), digest_of(make(5, 1))]
    assert len({first, *others}) == 5


@given(st.integers(0, 50), st.integers(1, 20), st.text())
def test_shuffling_keeps_every_row_and_moves_it_forward_by_no_more_than_the_buffer(number, size, seed):
    order = list(shuffled(range(number), size, seed))
    assert sorted(order) == list(range(number)) and order == list(shuffled(range(number), size, seed))
    assert all(row - place < size for place, row in enumerate(order))


def test_values_are_made_ahead_and_an_error_comes_where_its_value_would_have():
    made = []

    def values():
        for i in range(10):
            if i == 7:
                raise ValueError("seven")
            made.append(i)
            reached.set()
            yield i

    reached = threading.Event()
    reader = ahead(values(), 3)
    assert next(reader) == 0
    assert [next(reader) for _ in range(6)] == list(range(1, 7)) and made == list(range(7))
    with pytest.raises(ValueError, match="seven"):
        next(reader)
