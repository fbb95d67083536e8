"""AOT over packs, each with what its pairs were matched with, against sorting the whole batch at once."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_losses import make_pairs, subset, with_policy
from torch.nn.functional import logsigmoid

from megapref import losses


def by_sorting(loss, pairs, beta, eps):
    """The batch's loss with gradients through torch.sort: the definition."""
    sign = torch.where(pairs.preference_P >= 0.5, 1.0, -1.0)
    if loss is losses.aot:
        policy, ref = pairs.policy_P2, pairs.ref_P2
        g = (sign * (policy[:, 0] - policy[:, 1])).sort().values - (sign * (ref[:, 0] - ref[:, 1])).sort().values
    else:
        ratio = pairs.policy_P2 - pairs.ref_P2
        first_wins = sign > 0
        chosen = torch.where(first_wins, ratio[:, 0], ratio[:, 1])
        rejected = torch.where(first_wins, ratio[:, 1], ratio[:, 0])
        g = chosen.sort().values - rejected.sort().values
    return (-(1 - eps) * logsigmoid(beta * g) - eps * logsigmoid(-beta * g)).sum()


def in_packs(loss, pairs, packs, beta, eps):
    """What the step does: gather the statistics of all packs, match, train each pack by itself."""
    with torch.no_grad():
        statistics = torch.cat([loss.statistics(subset(pairs, pack)) for pack in packs])
    matched = loss.match(statistics)
    start, total = 0, 0.0
    for pack in packs:
        pairs_of_pack = subset(pairs, pack)
        extras = {name: value[start : start + len(pack)] for name, value in matched.items()}
        out = loss(replace(pairs_of_pack, extras_P=extras), beta=beta, label_smoothing=eps)
        total, start = total + out.loss_sum, start + len(pack)
    return total


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_packs_are_as_exact_as_the_whole(data):
    loss = data.draw(st.sampled_from([losses.aot, losses.aot_unpaired]))
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=8))
    preference = data.draw(st.lists(st.sampled_from([0.0, 0.4, 1.0]), min_size=len(lengths), max_size=len(lengths)))
    beta, eps = data.draw(st.sampled_from([0.1, 2.0])), data.draw(st.sampled_from([0.0, 0.2]))
    order = data.draw(st.permutations(range(len(lengths))))
    cut = sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=3)))
    packs = [list(order[a:b]) for a, b in zip([0, *cut], [*cut, len(order)], strict=True)]
    pairs = make_pairs(data.draw(st.integers(0, 99)), lengths, preference, dtype=torch.float64)

    values, grads = [], []
    for whole in (partial(by_sorting, loss), partial(in_packs, loss, packs=packs)):
        policy = pairs.policy_K.clone().requires_grad_()
        value = whole(pairs=with_policy(pairs, policy), beta=beta, eps=eps)
        value.backward()
        values.append(value.item())
        grads.append(policy.grad)
    assert values[1] == pytest.approx(values[0], rel=1e-12)
    assert torch.allclose(grads[1], grads[0], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss", [losses.aot, losses.aot_unpaired])
def test_asks_for_what_the_step_gathers(loss):
    with pytest.raises(ValueError, match="the loss needs aot_"):
        loss(replace(make_pairs(), extras_P={}))


def test_length_desensitizing_is_refused():
    with pytest.raises(ValueError, match=r"ld_alpha=0.5 .*use ld_alpha=1"):
        losses.combine(make_pairs(), losses=[(losses.dpo, 1.0), (partial(losses.aot, beta=0.2), 1.0)], ld_alpha=0.5)
