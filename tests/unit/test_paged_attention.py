"""Decoding attention on CPU over a paged cache: that of each request alone, whatever lies in the rest of the cache."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megapref.mcore.paged_attention import flash_attn_with_kvcache, of_similar_length

BLOCK, GROUPS, HEADS, WIDTH = 4, 2, 6, 8


@pytest.mark.parametrize("num_q", [1, 2])
@pytest.mark.parametrize("lengths", [(7, 100, 2, 31, 0, 96, 3, 8), (5,), (4, 4, 4), (200, 150, 2)], ids=str)
def test_each_request_attends_to_its_own_keys(lengths, num_q):
    torch.manual_seed(0)
    blocks_of = [-(-length // BLOCK) for length in lengths]
    total, table = sum(blocks_of) + 2, torch.full((len(lengths), max(blocks_of) + 1), -1, dtype=torch.int32)
    k_cache, v_cache = (torch.full((total, BLOCK, GROUPS, WIDTH), float("nan")) for _ in range(2))
    q, free = torch.randn(len(lengths), num_q, HEADS, WIDTH), iter(torch.randperm(total).tolist())
    expected = torch.zeros_like(q)
    for i, length in enumerate(lengths):
        if not length:
            continue
        keys, values = torch.randn(2, length, GROUPS, WIDTH)
        for n in range(blocks_of[i]):
            table[i, n] = block = next(free)
            part = slice(n * BLOCK, min((n + 1) * BLOCK, length))
            k_cache[block, : part.stop - part.start], v_cache[block, : part.stop - part.start] = keys[part], values[part]
        for head in range(HEADS):
            for token in range(num_q):
                seen = length - num_q + token + 1
                own = head // (HEADS // GROUPS)
                weights = (keys[:seen, own] @ q[i, token, head] / WIDTH**0.5).softmax(0)
                expected[i, token, head] = weights @ values[:seen, own]
    made = flash_attn_with_kvcache(q, k_cache, v_cache, torch.tensor(lengths, dtype=torch.int32), block_table=table)
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=1e-5)


@given(st.lists(st.integers(0, 2000), max_size=60))
def test_groups_are_of_similar_length(lengths):
    groups = of_similar_length(lengths)
    assert sorted(chain(*groups)) == [i for i, length in enumerate(lengths) if length]
    for group in groups:
        longest, shortest = max(lengths[i] for i in group), min(lengths[i] for i in group)
        assert longest == lengths[group[0]] and longest - shortest <= max(32, longest // 4)
