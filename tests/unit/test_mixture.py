"""Weighted sources: exact shares of every epoch, spread evenly, no row again before all of its source, the same whatever the batch size."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapref.config import Source
from megapref.data.mixture import rows_of, shares_of, step_rows

SIZES_AND_WEIGHTS = st.lists(st.tuples(st.integers(5, 30), st.floats(0.2, 1.0)), min_size=1, max_size=4)


def drawn(sizes, weights, number, batch_size=1, seed=0, shuffle=True):
    options = {"global_batch_size": batch_size, "seed": seed, "shuffle": shuffle}
    return np.concatenate([step_rows(sizes, weights, step=step, **options) for step in range(-(-number // batch_size))])[:number]


def source_of(rows, sizes):
    return np.searchsorted(np.cumsum(sizes), rows, side="right")


@given(SIZES_AND_WEIGHTS, st.integers(1, 12), st.integers(0, 3), st.booleans())
def test_shares_are_exact_and_rows_come_in_turn(sources, batch_size, seed, shuffle):
    sizes, weights = zip(*sources, strict=True)
    epoch, shares = sum(sizes), shares_of(sizes, weights)
    assert sum(shares) == epoch and all(abs(s - w / sum(weights) * epoch) < 1 for s, w in zip(shares, weights, strict=True))
    rows = drawn(sizes, weights, 3 * epoch, batch_size, seed, shuffle)
    assert rows.tolist() == drawn(sizes, weights, 3 * epoch, 1, seed, shuffle).tolist()
    sources_drawn = source_of(rows, sizes)
    for e in range(3):
        assert Counter(sources_drawn[e * epoch : (e + 1) * epoch].tolist()) == Counter(dict(enumerate(shares)))
    for source, size in enumerate(sizes):
        own = rows[sources_drawn == source]
        for start in range(0, len(own) - size + 1, size):
            assert sorted(own[start : start + size] - sum(sizes[:source])) == list(range(size))


@given(SIZES_AND_WEIGHTS)
def test_any_stretch_of_an_epoch_has_the_shares_to_a_row_or_two(sources):
    sizes, weights = zip(*sources, strict=True)
    rows, shares = drawn(sizes, weights, sum(sizes)), shares_of(sizes, weights)
    for end in range(1, sum(sizes)):
        counts = np.bincount(source_of(rows[:end], sizes), minlength=len(sizes))
        assert np.abs(counts - np.array(shares) * end / sum(sizes)).max() < len(sizes)


def test_seeds_and_epochs_shuffle_and_sources_differ():
    sizes, weights = (20, 20), (1.0, 1.0)
    first, second = drawn(sizes, weights, 80)[:40], drawn(sizes, weights, 80)[40:]
    assert first.tolist() != second.tolist() and first.tolist() != drawn(sizes, weights, 40, seed=1).tolist()
    assert (first[first < 20]).tolist() != (first[first >= 20] - 20).tolist()
    assert drawn((3, 2), (1.0, 1.0), 7, shuffle=False).tolist() == [0, 3, 1, 4, 2, 0, 3]


def test_rows_know_their_sources_and_too_small_a_weight_is_named():
    a, b = Source("a.jsonl", weight=3.0), Source("b.jsonl", weight=1.0)
    rows = rows_of(list("abcde"), [4, 5], [a, b])
    assert (list(rows), rows.sizes, rows.weights, rows[1:3]) == (list("abcde"), (4, 1), (3.0, 1.0), ["b", "c"])
    assert rows_of(list("ab"), [1, 2], [Source("a.jsonl"), Source("b.jsonl")]).weights is None
    with pytest.raises(ValueError, match=r"data.train\[1\].weight=0.001 of 3.001 is less than one of the 5 rows of an epoch; raise it"):
        rows_of(list("abcde"), [4, 5], [a, Source("b.jsonl", weight=0.001)])
    with pytest.raises(ValueError, match=r"no usable row in b.jsonl, which has weight=1.0"):
        rows_of(list("abcd"), [4, 4], [a, b])
