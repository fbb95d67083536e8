import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapref.batch import TokenPair
from megapref.data.packing import pack, packing_stats, pair_tokens


@st.composite
def token_pairs(draw, max_pairs=12):
    pairs = []
    for _ in range(draw(st.integers(0, max_pairs))):
        p, n, m = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(0, 6))
        ids = draw(st.lists(st.integers(1, 99), min_size=p + n + m, max_size=p + n + m))
        preference = draw(st.sampled_from([0.0, 0.3, 1.0]))
        pairs.append(TokenPair(ids[:p], ids[p : p + n], ids[p + n :], preference, {"margin": float(len(pairs))}))
    return pairs


def tokens_seen(batch, t):
    """The tokens that token t attends to, itself included, in order: written from the definition of a segment, one token at a time."""
    for start, length, prefix_start, prefix_length in batch.segments_S.tolist():
        if start <= t < start + length:
            seen = [*range(prefix_start, prefix_start + prefix_length), *range(start, t + 1)]
            return [int(batch.token_ids_T[i]) for i in seen], [int(batch.position_ids_T[i]) for i in seen]
    raise AssertionError(f"token {t} is in no segment")


def unpack(batch):
    """[(prompt, first, second, preference, extras)] read back through the indices that the model uses."""
    sides = {}
    for query, target, cell in zip(batch.query_index_K.tolist(), batch.target_ids_K.tolist(), batch.cell_K.tolist(), strict=True):
        context, positions = tokens_seen(batch, query)
        assert positions == list(range(len(context)))
        sides.setdefault(cell, []).append((context, target))
    out = []
    for i, preference in enumerate(batch.preference_P.tolist()):
        prompt = sides[2 * i][0][0]
        completions = []
        for cell in (2 * i, 2 * i + 1):
            completion = [target for _, target in sides.get(cell, [])]
            for k, (context, _) in enumerate(sides.get(cell, [])):
                assert context == prompt + completion[:k]
            completions.append(completion)
        out.append((prompt, *completions, round(preference, 6), batch.extras["margin"][i].item()))
    return out


@settings(deadline=None, max_examples=60)
@given(token_pairs(), st.integers(18, 60), st.integers(1, 4), st.booleans(), st.sampled_from([1, 4, 16]))
def test_every_pair_is_laid_out_once_and_reads_back_as_it_was(pairs, max_tokens, num_ranks, share_prompt, pad_multiple):
    max_tokens = max_tokens if share_prompt and pad_multiple == 1 else max_tokens + 30
    packs = pack(pairs, max_tokens=max_tokens, num_ranks=num_ranks, share_prompt=share_prompt, pad_multiple=pad_multiple)
    assert len(packs) == num_ranks and len({len(rank) for rank in packs}) == 1
    found = []
    for batch in (batch for rank in packs for batch in rank):
        assert 1 <= len(batch.token_ids_T) <= max_tokens and len(batch.token_ids_T) % pad_multiple == 0
        read = unpack(batch)
        assert [row[-1] for row in read] == sorted(row[-1] for row in read)  # the step's order within a pack
        found += read
    want = [(p.prompt_ids, p.first_ids, list(p.second_ids), p.preference, p.extras["margin"]) for p in pairs]
    assert sorted(found, key=lambda row: row[-1]) == want
    stats = packing_stats(packs)
    assert stats["pack/tokens"] == sum(pair_tokens(p, share_prompt=share_prompt) for p in pairs)
    assert 0 < stats["pack/balance"] <= 1 and 0 <= stats["pack/efficiency"] <= 1


@settings(deadline=None, max_examples=20)
@given(token_pairs())
def test_sharing_the_prompt_changes_the_layout_and_no_target(pairs):
    shared, twice = (pack(pairs, max_tokens=1000, share_prompt=share)[0][0] for share in (True, False))
    assert torch.equal(shared.target_ids_K, twice.target_ids_K) and torch.equal(shared.cell_K, twice.cell_K)
    assert torch.equal(shared.preference_P, twice.preference_P)
    saved = sum(len(p.prompt_ids) for p in pairs if p.second_ids)
    if pairs:
        assert len(twice.token_ids_T) - len(shared.token_ids_T) == saved
        assert packing_stats([[shared]])["pack/tokens_saved"] == pytest.approx(saved / len(twice.token_ids_T))


def test_layout_of_one_pair_by_hand():
    [[batch]] = pack([TokenPair([1, 2, 3], [4, 5], [6, 7, 8], 0.25)], max_tokens=10, pad_multiple=5)
    assert batch.token_ids_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0, 0]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 0]
    assert batch.segments_S.tolist() == [[0, 5, 0, 0], [5, 3, 0, 3], [8, 2, 8, 0]]
    assert batch.query_index_K.tolist() == [2, 3, 2, 5, 6]
    assert batch.target_ids_K.tolist() == [4, 5, 6, 7, 8]
    assert batch.cell_K.tolist() == [0, 0, 1, 1, 1]
    assert batch.preference_P.tolist() == [0.25] and batch.num_padding == 2
    assert {t.dtype for t in (batch.token_ids_T, batch.position_ids_T, batch.segments_S, batch.cell_K)} == {torch.int64}


def test_an_empty_second_side_is_one_segment():
    for share_prompt in (True, False):
        [[batch]] = pack([TokenPair([1, 2], [3])], max_tokens=9, share_prompt=share_prompt)
        assert batch.segments_S.tolist() == [[0, 3, 0, 0]] and batch.cell_K.tolist() == [0]


def test_ranks_without_pairs_get_empty_packs():
    packs = pack([TokenPair([1], [2], [3], 1.0, {"a": 1.0})], max_tokens=9, num_ranks=3, pad_multiple=4)
    assert [len(rank) for rank in packs] == [1, 1, 1]
    empty = packs[2][0]
    assert empty.num_rows == 0 and len(empty.cell_K) == 0 and empty.token_ids_T.tolist() == [0, 0, 0, 0] and empty.num_padding == 4
    assert empty.segments_S.tolist() == [[0, 4, 0, 0]] and empty.extras["a"].shape == (0,)
    assert packing_stats(pack([], max_tokens=8, num_ranks=2))["pack/tokens"] == 0


def random_step(num_pairs, seed=0):
    lengths = np.exp(np.random.default_rng(seed).normal(4.6, 0.6, (num_pairs, 3))).astype(int).clip(8, 300)
    return [TokenPair(*([7] * n for n in row)) for row in lengths]


def test_packs_are_few_full_and_even():
    packs = pack(random_step(256), max_tokens=4096, num_ranks=8)
    stats = packing_stats(packs)
    assert len(packs[0]) == -(-stats["pack/tokens"] // (8 * 4096))
    assert stats["pack/balance"] > 0.995 and stats["pack/efficiency"] == 1
    spread = [len(batch.token_ids_T) for rank in packs for batch in rank]
    assert min(spread) > 0.94 * max(spread)


def test_tight_packs_fall_back_to_first_fit_decreasing():
    sizes = [6, 6, 4, 4, 4]  # the least-loaded rule would make a pack of 14
    pairs = [TokenPair([1], [2] * (size - 1)) for size in sizes]
    packs = pack(pairs, max_tokens=12)
    assert [len(batch.token_ids_T) for batch in packs[0]] == [12, 12]


def test_uneven_packs_are_dealt_so_that_ranks_are_even():
    packs = pack([TokenPair([1], [2] * (size - 1)) for size in (10, 9, 3, 2)], max_tokens=10, num_ranks=2)
    assert [[len(batch.token_ids_T) for batch in rank] for rank in packs] == [[10, 2], [9, 3]]


def test_the_answer_depends_on_nothing_but_the_step():
    a, b = (pack(random_step(64), max_tokens=2048, num_ranks=2) for _ in range(2))
    assert all(torch.equal(x.token_ids_T, y.token_ids_T) for r, s in zip(a, b, strict=True) for x, y in zip(r, s, strict=True))


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([TokenPair([1] * 4, [2] * 3, [3] * 3)], {"max_tokens": 9}, r"10 tokens \(prompt 4, completions 3 and 3\).*max_tokens=9; raise"),
        ([TokenPair([1] * 4, [2] * 2, [3] * 2)], {"max_tokens": 9, "share_prompt": False}, "12 tokens"),
        ([TokenPair([1] * 9, [2])], {"max_tokens": 11, "pad_multiple": 4}, "10 tokens.*pack.max_tokens=8"),
        ([TokenPair([], [2], [3])], {"max_tokens": 9}, "pair 0 of the step has an empty prompt"),
        ([TokenPair([1], [], [3])], {"max_tokens": 9}, "pair 0 of the step has an empty first completion"),
        ([TokenPair([1], [2], [], 1.0, {"a": 1.0}), TokenPair([1], [2])], {"max_tokens": 9}, r"pair 1 .* extras \[\], pair 0 \['a'\]"),
        ([], {"max_tokens": 3, "pad_multiple": 16}, "pack.max_tokens=3 is less than 16"),
    ],
)
def test_impossible_steps_are_refused(pairs, options, message):
    with pytest.raises(ValueError, match=message):
        pack(pairs, **options)


@settings(deadline=None, max_examples=20)
@given(token_pairs(), st.integers(1, 3), st.sampled_from([1, 4, 16]))
def test_packs_of_one_length_are_the_others_with_more_padding(pairs, num_ranks, pad_multiple):
    options = {"max_tokens": 50, "num_ranks": num_ranks, "pad_multiple": pad_multiple}
    for rank, long_rank in zip(pack(pairs, **options), pack(pairs, **options, one_length=True), strict=True):
        for batch, long in zip(rank, long_rank, strict=True):
            assert len(long.token_ids_T) == len(long.position_ids_T) == 50 // pad_multiple * pad_multiple
            used = len(batch.token_ids_T) - batch.num_padding
            assert used == len(long.token_ids_T) - long.num_padding and torch.equal(batch.token_ids_T[:used], long.token_ids_T[:used])
            assert torch.equal(batch.query_index_K, long.query_index_K) and torch.equal(batch.cell_K, long.cell_K)
            assert int(long.position_ids_T[used:].sum()) == 0, "the padding is longer than the model may have positions"


@pytest.mark.parametrize("share_prompt", [True, False])
def test_masked_tokens_are_seen_but_not_trained(share_prompt):
    plain = TokenPair([1, 2], [3, 4, 5], [6, 7])
    masked = TokenPair([1, 2], [3, 4, 5], [6, 7], first_mask=[True, False, True])
    ((whole,),), ((part,),) = (pack([pair], max_tokens=64, share_prompt=share_prompt) for pair in (plain, masked))
    assert part.token_ids_T.tolist() == whole.token_ids_T.tolist() and part.segments_S.tolist() == whole.segments_S.tolist()
    assert part.target_ids_K.tolist() == [3, 5, 6, 7] and part.cell_K.tolist() == [0, 0, 1, 1]
    assert part.query_index_K.tolist() == [q for i, q in enumerate(whole.query_index_K.tolist()) if i != 1]
