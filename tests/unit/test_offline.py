import dataclasses
import json
from itertools import islice

import pytest
from tiny_tokenizers import save_tokenizer

from megapref.batch import TokenPair
from megapref.config import Config, Data, Source
from megapref.data.chat import load_tokenizer
from megapref.data.mixture import Rows
from megapref.data.offline import load_pairs, offline_pairs, pair_options, truncate
from megapref.data.packing import pack
from megapref.data.rows import BadRow, Location

HERE = Location("rows.jsonl", 3)
NOTHING = {f"data/{name}_rows": 0 for name in ("dropped", "filtered", "truncated", "tied")}
P, A, B = [1, 2, 3, 4], [11, 12, 13, 14, 15], [21, 22, 23]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def source(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Source(path=str(path))

    return write


def pair_row(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_rows_become_pairs_that_can_be_packed(tokenizer, source):
    rows = [pair_row("hello", " the cat", " a dog"), {"prompt": "hello", "completion": " you"}]
    pairs, counts = load_pairs([source(*rows)], tokenizer)
    eos = tokenizer.eos_token_id
    assert [list(ids) for ids in (pairs[0].prompt_ids, pairs[0].first_ids, pairs[0].second_ids)] == [
        tokenizer("hello").input_ids,
        [*tokenizer(" the cat").input_ids, eos],
        [*tokenizer(" a dog").input_ids, eos],
    ]
    assert pairs[0].preference == 1.0 and list(pairs[1].first_ids) == [*tokenizer(" you").input_ids, eos] and len(pairs[1].second_ids) == 0
    assert counts == NOTHING
    [[batch]] = pack(pairs, max_tokens=100)
    assert batch.target_ids_K.tolist() == [*pairs[0].first_ids, *pairs[0].second_ids, *pairs[1].first_ids]


@pytest.mark.parametrize(
    ("limits", "truncation", "prompt", "first", "second"),
    [
        ((None, None, None), "keep_end", P, A, B),
        ((9, None, None), "error", P, A, B),
        ((None, 2, None), "keep_end", [3, 4], A, B),
        ((None, 2, None), "keep_start", [1, 2], A, B),
        ((None, None, 2), "keep_end", P, A[:2], B[:2]),
        ((7, None, None), "keep_end", [3, 4], A, B),
        ((7, None, None), "keep_start", P, A[:3], B),
        ((4, None, None), "keep_end", [4], A[:3], B),
        ((4, None, None), "keep_start", P, [], []),
        ((5, 3, 4), "keep_end", [4], A[:4], B),
        ((5, 3, 4), "keep_start", P[:3], A[:2], B[:2]),
    ],
)
def test_truncation(limits, truncation, prompt, first, second):
    assert truncate(P, [A, B], limits, truncation, HERE) == (prompt, [first, second])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((8, None, None), "row 3: prompt and completion: 9 tokens, over data.max_length=8"),
        ((None, 3, None), "row 3: prompt: 4 tokens, expected at most 3"),
        ((None, None, 4), "row 3: completion: 5 tokens, over data.max_completion_length=4"),
    ],
)
def test_truncation_error_names_the_row(limits, message):
    with pytest.raises(BadRow, match=message):
        truncate(P, [A, B], limits, "error", HERE)


def test_rows_left_with_nothing_to_train_are_dropped_and_counted(tokenizer, source):
    long = "what is two and three? it is five"
    rows = [pair_row(long, " the", " a"), pair_row("hello", " the cat sat", " the cat ran"), pair_row("a", " the", " dog")]
    limit = len(tokenizer(long).input_ids)
    pairs, counts = load_pairs([source(*rows)], tokenizer, max_length=limit, max_completion_length=2, truncation="keep_start")
    assert len(pairs) == 1 and list(pairs[0].prompt_ids) == tokenizer("a").input_ids
    assert counts == NOTHING | {"data/dropped_rows": 2}


def test_truncated_rows_are_counted(tokenizer, source):
    pairs, counts = load_pairs([source(pair_row("the cat sat on the mat", " the", " a"))], tokenizer, max_prompt_length=2)
    assert len(pairs[0].prompt_ids) == 2 and counts["data/truncated_rows"] == 1


def test_bad_rows_are_named_or_skipped_and_counted(tokenizer, source):
    rows = source(pair_row("hello", " the", " a"), {"prompt": "hello"}, pair_row("hello", " the cat", " the cat"))
    with pytest.raises(BadRow, match=r"row 2: has the keys \['prompt'\]"):
        load_pairs([rows], tokenizer)
    pairs, counts = load_pairs([rows], tokenizer, on_bad_row="skip")
    assert len(pairs) == 1 and counts["data/dropped_rows"] == 2


def test_a_pair_longer_than_the_pack_is_found_before_training(tokenizer, source):
    rows = source(pair_row("hello", " the", " a"))
    size = sum(map(len, (lambda p: (p.prompt_ids, p.first_ids, p.second_ids))(load_pairs([rows], tokenizer)[0][0])))
    assert len(load_pairs([rows], tokenizer, pack_tokens=size)[0]) == 1
    for options in ({"pack_tokens": size - 1}, {"pack_tokens": size, "share_prompt": False}):
        with pytest.raises(BadRow, match=r"row 1: the pair takes \d+ tokens, more than pack.max_tokens="):
            load_pairs([rows], tokenizer, **options)


def test_ties(tokenizer, source):
    tie = {"context": "hello", "completions": [{"rank": 1, "completion": " the"}, {"rank": 1, "completion": " a"}]}
    rows = source(tie, pair_row("hello", " the", " a"))
    with pytest.raises(BadRow, match="row 1: completions: all have rank 1"):
        load_pairs([rows], tokenizer)
    pairs, counts = load_pairs([rows], tokenizer, ties="skip")
    assert len(pairs) == 1 and counts["data/tied_rows"] == 1 and counts["data/dropped_rows"] == 0
    with pytest.raises(ValueError, match=r"data.ties='first' is not known"):
        load_pairs([rows], tokenizer, ties="first")


def test_every_two_of_ranked_completions_are_pairs(tokenizer, source):
    ranked = [{"rank": rank, "completion": text} for rank, text in ((1, " the"), (0, " a"), (1, " dog"))]
    rows = source({"context": "hello", "completions": ranked})
    assert len(load_pairs([rows], tokenizer)[0]) == 1
    pairs, counts = load_pairs([rows], tokenizer, pairing="all", ties="skip")
    assert [tokenizer.decode(pair.second_ids) for pair in pairs] == [" the<|im_end|>", " dog<|im_end|>"]
    assert pairs.sizes == (2,) and counts == NOTHING | {"data/tied_rows": 1}


def test_masks_are_cut_with_the_completion_and_a_pair_without_trained_token_is_dropped(tokenizer, source):
    user, assistant = ({"role": role, "content": "hello"} for role in ("user", "assistant"))
    rows = source(pair_row([user], [assistant, user, assistant], [assistant]))
    [pair], _ = load_pairs([rows], tokenizer)
    first = list(pair.first_mask)
    assert pair.second_mask is None and len(first) == len(pair.first_ids) and first == sorted(first) and 0 < sum(first) < len(first)
    [all_trained], _ = load_pairs([rows], tokenizer, train_on="all_assistant")
    assert sum(all_trained.first_mask) == 2 * len(pair.second_ids) == 2 * sum(first)
    [cut], counts = load_pairs([rows], tokenizer, max_completion_length=len(first) - 1)
    assert list(cut.first_mask) == first[:-1] and counts == NOTHING | {"data/truncated_rows": 1}
    dropped = []
    with pytest.raises(ValueError, match=r"no usable row in .*completion: no token is left that could be trained; raise data.max_length"):
        load_pairs([rows], tokenizer, max_completion_length=first.index(True), dropped=dropped)
    assert len(dropped) == 1


def test_scores_are_extras_where_all_pairs_have_them(tokenizer, source):
    scored = pair_row("hello", " the", " a") | {"score_chosen": 5, "score_rejected": 2.5}
    pairs, _ = load_pairs([source(scored, scored)], tokenizer)
    assert [pair.extras for pair in pairs] == [{"score_first": 5.0, "score_second": 2.5}] * 2
    pairs, _ = load_pairs([source(scored, pair_row("hello", " the", " a"))], tokenizer)
    assert [pair.extras for pair in pairs] == [{}, {}] and pack(pairs, max_tokens=100)


def test_filtered_rows_are_counted_and_sources_are_weighted(tokenizer, source, tmp_path):
    rows = source(pair_row("hello", " the", " a"), pair_row("what is two and three?", " the", " a"))
    filtering = dataclasses.replace(rows, filter_length=True, weight=1.0)
    pairs, counts = load_pairs([filtering, dataclasses.replace(rows, weight=3.0)], tokenizer, max_new_tokens=4)
    assert counts == NOTHING | {"data/filtered_rows": 1} and (pairs.sizes, pairs.weights) == ((1, 2), (1.0, 3.0))
    one_epoch = next(offline_pairs(pairs, global_batch_size=3, rank=0, num_ranks=1, seed=0))
    assert sum(pair is pairs[0] for pair in one_epoch.pairs) == 1


def test_options_are_read_from_a_config(tokenizer, source):
    cfg = Config(data=Data(pairing="all", on_bad_row="skip"))
    pairs, counts = load_pairs([source(pair_row("hello", " the", " a"), {})], tokenizer, **pair_options(cfg, pack_tokens=64))
    assert len(pairs) == 1 and counts == NOTHING | {"data/dropped_rows": 1}


def test_steps_are_shared_by_ranks_resumed_and_tell_the_counts_once():
    pairs = Rows([TokenPair([i], [i], [i + 1]) for i in range(5)], (5,))

    def steps(rank, num_ranks, start_step, number):
        options = dict(global_batch_size=4, rank=rank, num_ranks=num_ranks, seed=1, start_step=start_step)
        return list(islice(offline_pairs(pairs, **options, counts={"data/dropped_rows": 2}), number))

    alone = steps(0, 1, 0, 5)
    assert [batch.step for batch in alone] == [0, 1, 2, 3, 4]
    assert alone[0].sums == {"data/dropped_rows": (2.0, 1.0)} and all(not batch.sums for batch in alone[1:])
    assert [batch.pairs for batch in steps(0, 1, 3, 2)] == [batch.pairs for batch in alone[3:]]
    for a, b, whole in zip(steps(0, 2, 0, 5), steps(1, 2, 0, 5), alone, strict=True):
        assert a.pairs == whole.pairs[::2] and b.pairs == whole.pairs[1::2]
    in_order = next(offline_pairs(pairs, global_batch_size=7, rank=0, num_ranks=1, seed=1, shuffle=False))
    assert [pair.prompt_ids[0] for pair in in_order.pairs] == [0, 1, 2, 3, 4, 0, 1]
