"""Attention over segments against one dense call with the mask written out."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megapref.mcore import setup  # noqa: F401  makes Core importable without a GPU
from megapref.mcore.attention import attend, attend_varlen
from megapref.mcore.segments import VarlenPlan, attention_plan, context_rows, varlen_plan

CPU = torch.device("cpu")


def segments_of_pairs(pairs: list[tuple[int, int, int]]) -> tuple[torch.Tensor, int]:
    rows, start = [], 0
    for prompt, first, second in pairs:
        rows += [(start, prompt + first, 0, 0), (start + prompt + first, second, start, prompt)]
        start += prompt + first + second
    return torch.tensor(rows), start


def dense(query, key, value, segments, window=1000):
    allowed = torch.zeros(len(query), len(query), dtype=torch.bool)
    for start, length, prefix_start, prefix in segments.tolist():
        distance = (prefix + torch.arange(length))[:, None] - torch.arange(prefix + length)
        seen = (distance >= 0) & (distance < window)
        allowed[start : start + length, prefix_start : prefix_start + prefix] = seen[:, :prefix]
        allowed[start : start + length, start : start + length] = seen[:, prefix:]
    heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=allowed, enable_gqa=True)[0].transpose(0, 1)


def bottom_right(window: int, query, key, value, plan: VarlenPlan):
    """What a kernel for segments of any lengths computes: a segment's last row sees all of its keys, each row before it one less."""
    starts_q, starts_kv = plan.starts_q.tolist(), plan.starts_kv.tolist()
    assert plan.starts_q.dtype == torch.int32 and starts_q[-1] == len(query) and starts_kv[-1] == len(key)
    assert max(b - a for a, b in pairwise(starts_q)) == plan.longest_q and max(b - a for a, b in pairwise(starts_kv)) == plan.longest_kv
    outputs = []
    for q, k, v in zip(query.tensor_split(starts_q[1:-1]), key.tensor_split(starts_kv[1:-1]), value.tensor_split(starts_kv[1:-1]), strict=True):
        distance = (len(k) - len(q) + torch.arange(len(q)))[:, None] - torch.arange(len(k))
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        mask = (distance >= 0) & (distance < window)
        outputs.append(F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outputs)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 330), st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=8),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([None, 1, 7, 40, 128, 150]),
    st.sampled_from([1, 2, 3]),
)
def test_segments_equal_dense_attention(pairs, num_groups, window, context):
    segments, num_tokens = segments_of_pairs(pairs)
    padding = -num_tokens % (2 * context)
    segments, num_tokens = torch.cat([segments, torch.tensor([[num_tokens, padding, 0, 0]])]), num_tokens + padding
    torch.manual_seed(0)
    query = torch.randn(num_tokens, 4, 8, requires_grad=True)
    key, value = (torch.randn(num_tokens, num_groups, 8, requires_grad=True) for _ in range(2))
    weights = torch.randn(num_tokens, 4, 8)
    rows = torch.from_numpy(context_rows(num_tokens, context))
    gathered = rows.flatten()
    plans = [attention_plan(segments, CPU, num_tokens, window, (context, rank)) for rank in range(context)]
    parts = [attend(query[rows[rank]], key[gathered], value[gathered], plan, None) for rank, plan in enumerate(plans)]
    out = torch.cat(parts)[gathered.argsort()]
    expected = dense(query, key, value, segments, window or 1000)
    varlens = [varlen_plan(segments, CPU, num_tokens, (context, rank)) for rank in range(context)]
    kernel = partial(bottom_right, window or 1000)
    parts = [attend_varlen(query[rows[rank]], key[gathered], value[gathered], plan, kernel) for rank, plan in enumerate(varlens)]
    torch.testing.assert_close(torch.cat(parts)[gathered.argsort()], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad((out * weights).sum(), (query, key, value))
    for mine, theirs in zip(gradients, torch.autograd.grad((expected * weights).sum(), (query, key, value)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)


def test_short_segments_share_calls_and_long_ones_do_not():
    short, num_short = segments_of_pairs([(5, 5, 5)] * 10)
    assert len(attention_plan(short, CPU, num_short).groups) == 2  # prompt + first of all pairs; second of all pairs
    long, num_long = segments_of_pairs([(200, 100, 100)] * 3)
    assert len(attention_plan(long, CPU, num_long).groups) == 6


@pytest.mark.parametrize("lengths", [[7, 7, 7], [50, 3, 21]])
def test_plain_segments_need_no_reordering_when_alone(lengths):
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    segments = torch.tensor([(int(s), n, 0, 0) for s, n in zip(starts, lengths, strict=True)])
    query = torch.randn(sum(lengths), 2, 4)
    torch.testing.assert_close(
        attend(query, query, query, attention_plan(segments, CPU, len(query)), None), dense(query, query, query, segments), atol=1e-5, rtol=1e-5
    )
