"""Every pair loss against its formula, written out for one pair in plain floats, for either reading of the pair and between."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from plain_losses import DIVERGENCES, LENGTHS, LS, OF_Z, OTHERS, PREFERENCE, B, Side, make_pairs, plain

from megapref import losses
from megapref.batch import needs
from megapref.losses.combined import is_first_only, needs_reference, parts
from megapref.losses.terms import weighted_by_policy


@pytest.mark.parametrize(("loss", "params", "of_reading"), OF_Z + OTHERS)
def test_formula(loss, params, of_reading):
    pairs = make_pairs()
    out = loss(pairs, beta=B, **params)
    assert out.loss_sum.item() == pytest.approx(plain(pairs, of_reading), rel=1e-5, abs=1e-6) and out.count == len(LENGTHS)


@pytest.mark.parametrize(("divergence", "z"), DIVERGENCES)
@pytest.mark.parametrize(("loss", "params", "of_reading"), OF_Z)
def test_formula_with_another_divergence(loss, params, of_reading, divergence, z):
    pairs = make_pairs(scale=1.0)
    out = loss(pairs, beta=B, **params, **divergence)
    assert out.loss_sum.item() == pytest.approx(plain(pairs, of_reading, z), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("divergence", "z"), DIVERGENCES)
@pytest.mark.parametrize("loss", [losses.sigmoid_norm, partial(losses.ipo, average_log_probs=True)])
def test_centered_scores_are_zero_where_policy_is_reference(loss, divergence, z):
    pairs = make_pairs()
    same = replace(pairs, ref_K=pairs.policy_K)
    without = loss(same, beta=B).loss_sum.item()
    assert loss(same, beta=B, centered=True, **divergence).loss_sum.item() == pytest.approx(without, rel=1e-6)


def test_unknown_divergence():
    with pytest.raises(ValueError, match="f_divergence='kl' must be one of reverse_kl"):
        losses.dpo(make_pairs(), f_divergence="kl")


GOLDEN = [
    (losses.dpo, {}, math.log(2)),
    (losses.sigmoid_norm, {}, math.log(2)),
    (losses.robust, {"label_smoothing": 0.3}, math.log(2)),
    (losses.hinge, {}, 1),
    (losses.ipo, {}, 1 / (4 * B**2)),
    (losses.sppo_hard, {}, 1 / (2 * B**2)),
    (losses.apo_zero, {}, 1),
    (losses.apo_down, {}, 1),
    (losses.nca_pair, {}, 2 * math.log(2)),
    (losses.bco_pair, {}, 2 * math.log(2)),
    (losses.discopop, {}, 0.846574),
    (losses.exo_pair, {}, 2.761231),
    (losses.dpop, {}, math.log(2)),
    *[(loss, {"gt_reward_scale": 0.0}, 0) for loss in (losses.rpo_sq, losses.rpo_bwd_kl, losses.rpo_fwd_kl)],
]


@pytest.mark.parametrize(("loss", "params", "golden"), GOLDEN)
def test_golden_value_where_policy_is_reference(loss, params, golden):
    pairs = make_pairs()
    out = loss(replace(pairs, ref_K=pairs.policy_K), beta=B, **params)
    assert out.loss_sum.item() / out.count == pytest.approx(golden, rel=1e-6, abs=1e-7)
    assert out.metric_sums["rewards/margins"].item() == 0 and out.metric_sums["rewards/accuracies"].item() == 0


def test_weights_of_preference_and_likelihood():
    pairs = make_pairs(preference=[1.0, 0.0, 1.0, 0.0])
    for average in (False, True):
        out = losses.dpo(pairs, beta=B, preference_loss_weight=0.7, sft_loss_weight=0.2, sft_average_log_probs=average)
        want = plain(pairs, lambda w, x, a=average: -0.7 * LS(B * (w.r - x.r)) - 0.2 * w.lp / (w.n if a else 1))
        assert out.loss_sum.item() == pytest.approx(want, rel=1e-5)
        shares = out.metric_sums["loss/preference"] + out.metric_sums["loss/sft"]
        assert shares.item() == pytest.approx(want, rel=1e-5)
    assert out.metric_sums.keys() == losses.dpo(pairs).metric_sums.keys() | {"loss/preference", "loss/sft"}


def test_ground_truth_scores_are_asked_for():
    pairs = replace(make_pairs(), extras_P={"score_first": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"needs score_second of every pair, and the pairs have \['score_first'\]"):
        losses.rpo_sq(pairs)


def test_rewards_of_reference_free_losses_are_their_own():
    pairs = make_pairs()
    for loss, reward in [(losses.simpo, lambda c: B * c.lp / c.n), (losses.cpo, lambda c: B * c.lp), (losses.orpo, lambda c: B * c.lp / c.n)]:
        sums = loss(pairs, beta=B).metric_sums
        sides = [[Side(pairs, i, side, lambda r: r) for side in ((0, 1) if p >= 0.5 else (1, 0))] for i, p in enumerate(PREFERENCE)]
        assert sums["rewards/margins"].item() == pytest.approx(sum(reward(w) - reward(x) for w, x in sides), rel=1e-4)
        assert "objective/kl" not in sums and loss(replace(pairs, ref_K=pairs.ref_K * 0)).loss_sum == loss(pairs).loss_sum


def test_combination_is_the_weighted_sum():
    pairs = make_pairs()
    members = [(partial(losses.dpo, beta=B), 0.8), (partial(losses.bco_pair, beta=0.1), 0.2), (losses.sft, 1.0), (losses.sft, 0.5)]
    out = losses.combine(pairs, losses=members)
    alone = [weight * loss(pairs).loss_sum.item() for loss, weight in members]
    assert out.loss_sum.item() == pytest.approx(sum(alone), rel=1e-6) and out.count == 4
    shares = {name: value.item() for name, value in out.metric_sums.items() if name.startswith("loss/")}
    assert shares == pytest.approx({"loss/dpo": alone[0], "loss/bco_pair": alone[1], "loss/sft": alone[2] + alone[3]}, rel=1e-6)
    assert out.metric_sums["rewards/chosen"] == losses.dpo(pairs, beta=B).metric_sums["rewards/chosen"]
    with pytest.raises(ValueError, match="of at least one loss"):
        losses.combine(pairs, losses=[])


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
def test_length_desensitized(ld_alpha):
    pairs = make_pairs()
    perm = torch.tensor(sorted(range(len(pairs.cell_K)), key=lambda k: -pairs.cell_K[k].item()))  # completions in another order
    weight = torch.tensor([1, 1, ld_alpha] + [1, 1] + [1, 1] + 3 * [ld_alpha] + [1, 1] + 10 * [1])
    want = losses.dpo(replace(pairs, policy_K=pairs.policy_K * weight, ref_K=pairs.ref_K * weight), beta=B)
    for view in (pairs, replace(pairs, policy_K=pairs.policy_K[perm], ref_K=pairs.ref_K[perm], cell_K=pairs.cell_K[perm])):
        out = losses.combine(view, losses=[(partial(losses.dpo, beta=B), 1.0)], ld_alpha=ld_alpha)
        assert out.loss_sum.item() == pytest.approx(want.loss_sum.item(), rel=1e-6)


def test_a_pairs_weight_multiplies_its_loss():
    weight = torch.tensor([0.0, 2.0, 0.5, 1.0])
    for loss in (losses.dpo, losses.sft, losses.rpo_sq, losses.orpo, losses.aot, losses.nash_md):
        whole = make_pairs()
        alone = []
        for i in range(4):
            one = torch.zeros(4)
            one[i] = 1
            alone.append(loss(replace(whole, extras_P=whole.extras_P | {"weight": one})).loss_sum)
        out = loss(replace(whole, extras_P=whole.extras_P | {"weight": weight}))
        assert out.loss_sum.item() == pytest.approx((torch.stack(alone) * weight).sum().item(), rel=1e-5) and out.count == 4
        assert sum(alone).item() == pytest.approx(loss(whole).loss_sum.item(), rel=1e-5)


def test_weight_by_policy():
    pairs = make_pairs()
    log_sum_sq = -torch.rand(len(pairs.cell_K), generator=torch.Generator().manual_seed(5))
    weights = []
    for i in range(4):
        mean = [(pairs.policy_K - log_sum_sq)[pairs.cell_K == 2 * i + side].mean().item() for side in (0, 1)]
        weights.append(math.exp(mean[0]) * math.exp(mean[1]))
    weighted = weighted_by_policy(replace(pairs, policy_K=pairs.policy_K.requires_grad_(), extras_K={"log_sum_sq": log_sum_sq}))
    assert weighted.extras_P["weight"].tolist() == pytest.approx(weights, rel=1e-5)
    assert not weighted.extras_P["weight"].requires_grad and weighted.policy_K.requires_grad


def entropy_of(pairs, mode, side=0):
    tokens = pairs.cell_K % 2 == side
    return (pairs.extras_K["entropy"] if mode == "full_vocab" else -pairs.policy_K.exp() * pairs.policy_K)[tokens].sum().item()


@pytest.mark.parametrize("mode", ["full_vocab", "sampled_surrogate"])
def test_xpo_adds_the_second_completions_likelihood_whichever_won(mode):
    pairs = make_pairs()
    out = losses.xpo(pairs, beta=B, alpha=0.3, entropy_regularization=0.2, entropy_mode=mode)
    second = pairs.policy_K[pairs.cell_K % 2 == 1].sum().item()
    want = losses.dpo(pairs, beta=B).loss_sum.item() + 0.3 * second - 0.2 * entropy_of(pairs, mode)
    assert out.loss_sum.item() == pytest.approx(want, rel=1e-5)
    assert (out.metric_sums["loss/dpo"] + out.metric_sums["loss/xpo"]).item() == pytest.approx(want, rel=1e-5)


def test_nash_md_has_the_policys_gradient_on_the_first_completion_alone():
    pairs = make_pairs(preference=[0.9, 0.1, 0.5, 0.0])
    policy = pairs.policy_K.clone().requires_grad_()
    out = losses.nash_md(replace(pairs, policy_K=policy), beta=B)
    out.loss_sum.backward()
    first = pairs.cell_K % 2 == 0
    want = B * (pairs.policy_K - pairs.ref_K) - (pairs.preference_P[pairs.cell_K // 2] - 0.5)
    assert torch.allclose(policy.grad, want * first, atol=1e-6)
    assert out.loss_sum.item() == pytest.approx((want * pairs.policy_K)[first].sum().item(), rel=1e-5)
    metrics = {name: value.item() for name, value in out.metric_sums.items()}
    assert metrics["loss/kl"] - metrics["loss/score"] == pytest.approx(out.loss_sum.item(), rel=1e-5)
    for mode in ("full_vocab", "sampled_surrogate"):
        regularized = losses.nash_md(pairs, beta=B, entropy_regularization=0.5, entropy_mode=mode).loss_sum
        assert regularized.item() == pytest.approx(out.loss_sum.item() - 0.5 * entropy_of(pairs, mode), rel=1e-5)


def test_metrics_of_the_first_completion_alone():
    pairs = make_pairs(preference=[0.9, 0.1, 0.5, 0.0])
    metrics = {name: value.item() for name, value in losses.nash_md(pairs, beta=B).metric_sums.items()}
    lp, lr = ([values[pairs.cell_K == 2 * i].sum().item() for i in range(4)] for values in (pairs.policy_K, pairs.ref_K))
    r = [a - b for a, b in zip(lp, lr, strict=True)]
    margins = [B * r[0], -B * r[1], B * r[2], -B * r[3]]
    want = {"rewards/chosen": B * (r[0] + r[2]), "rewards/rejected": B * (r[1] + r[3]), "logps/rejected": lp[1] + lp[3], "objective/kl": sum(r)}
    want |= {"rewards/margins": sum(margins), "rewards/accuracies": sum(m > 0 for m in margins), "rewards/probabilities": 1.5}
    want |= {"objective/entropy": -sum(lp), "logps/ref_chosen": lr[0] + lr[2], "length/chosen": 4, "count logps/chosen": 2}
    assert {name: metrics[name] for name in want} == pytest.approx(want, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("mode", ["full_vocab", "sampled_surrogate"])
def test_any_loss_may_be_regularized_by_entropy(mode):
    pairs = make_pairs()
    out = losses.combine(pairs, losses=[(partial(losses.ipo, beta=B), 1.0)], entropy_regularization=0.5, entropy_mode=mode)
    bonus = (entropy_of(pairs, mode, 0) + entropy_of(pairs, mode, 1)) / 2
    assert out.loss_sum.item() == pytest.approx(losses.ipo(pairs, beta=B).loss_sum.item() - 0.5 * bonus, rel=1e-5)
    assert out.metric_sums["loss/entropy"].item() == pytest.approx(-0.5 * bonus, rel=1e-5)


def test_what_a_loss_needs():
    regularized = partial(losses.xpo, entropy_regularization=0.1)
    assert needs(regularized) == needs(partial(losses.combine, losses=[(regularized, 1.0)])) == {"entropy"}
    assert not needs(partial(losses.nash_md, entropy_regularization=0.1, entropy_mode="sampled_surrogate")) and not needs(losses.nash_md)
    assert is_first_only(partial(losses.nash_md, beta=B)) and not is_first_only(losses.xpo)
    assert not is_first_only(partial(losses.combine, losses=[(losses.nash_md, 1.0), (losses.sft, 0.1)]))
    free = {losses.simpo, losses.cpo, losses.orpo, losses.sft}
    assert all(needs_reference(partial(loss, **params)) == (loss not in free) for loss, params, _ in OF_Z + OTHERS)
    mixed = partial(losses.combine, losses=[(losses.sft, 1.0), (partial(losses.combine, losses=[(partial(losses.dpo, beta=B), 1.0)]), 0.5)])
    assert parts(mixed) == [losses.sft, losses.dpo] and needs_reference(mixed)
    assert not needs_reference(partial(losses.combine, losses=[(losses.sft, 1.0), (partial(losses.simpo, beta=B), 1.0)]))
    assert needs_reference(lambda pairs: None)
