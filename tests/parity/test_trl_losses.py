"""Losses and gradients against TRL's own, frozen by trl/freeze_losses.py: the same batch of synthetic log-probabilities, float32, 1e-5.

Where TRL means something else, the parameters that say the same are given here:
- TRL averages `ipo` over tokens: `average_log_probs`.
- TRL's transforms of other f-divergences are 0 at r = 0, which only shows after division by lengths: `centered`.
- TRL's `sigmoid` ignores label_smoothing; ours is conservative DPO.
- TRL's `sft` is the mean over all chosen tokens of the batch, ours the mean over pairs of each one's own mean: weighing each pair by its number
  of tokens per mean number of tokens makes one of the other.
- `simpo_gamma` is `gamma`; TRL's `cpo_loss` and `odds_ratio_loss` are without the likelihood term.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megapref import losses
from megapref.batch import PairLogps, UnpairedLogps
from megapref.losses.terms import length_desensitized, weighted_by_policy

FROZEN = json.loads((Path(__file__).parent / "trl" / "losses.json").read_text())
BETA, NUM = FROZEN["beta"], len(FROZEN["lengths"])
NAMES = {"sigmoid": "dpo"}
RENAMED = {"f_divergence_type": "f_divergence", "f_alpha_divergence_coef": "alpha", "discopop_tau": "tau", "simpo_gamma": "gamma"}
OF_WHOLE_LOSS = ("loss_type", "loss_weights", "ld_alpha", "use_weighting")


def cases(*trainers):
    chosen = [case for case in FROZEN["cases"] if case["trainer"] in trainers]
    return pytest.mark.parametrize("case", chosen, ids=[f"{case['trainer']}-{json.dumps(case['options'])}" for case in chosen])


def frozen_cells():
    """TRL's rows are all chosen, then all rejected."""
    rows = [(2 * i + side, lengths[side]) for side in (0, 1) for i, lengths in enumerate(FROZEN["lengths"])]
    return torch.tensor([cell for cell, length in rows for _ in range(length)])


def token_values(name):
    return torch.tensor(FROZEN["tokens"][name])


def check(case, loss_sum, count, policy_K):
    loss = loss_sum / count
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    want = torch.tensor(case["grad"])
    assert torch.allclose(policy_K.grad, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())


def ours(name, options):
    """Our loss of TRL's name, with the parameters that say what TRL does."""
    params = {RENAMED.get(key, key): value for key, value in options.items() if key not in OF_WHOLE_LOSS}
    if name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "discopop"):
        params.pop("label_smoothing", None)
    if name in ("sigmoid_norm", "ipo"):
        params["centered"] = True
    if name == "ipo":
        params["average_log_probs"] = True
    return losses.sft if name == "sft" else partial(getattr(losses, NAMES.get(name, name)), beta=BETA, **params)


def batch_weighted_sft(pairs):
    lengths = pairs.length_P2[:, 0]
    return losses.sft(replace(pairs, extras_P={"weight": lengths / lengths.mean()}))


@cases("DPOTrainer")
def test_pair_losses(case):
    options = case["options"]
    policy_K = token_values("policy").requires_grad_()
    pairs = PairLogps(policy_K, token_values("ref"), frozen_cells(), torch.ones(NUM))
    if options.get("use_weighting"):
        pairs = weighted_by_policy(replace(pairs, extras_K={"log_sum_sq": token_values("log_sum_sq")}))
    parts = [batch_weighted_sft if name == "sft" else ours(name, options) for name in options["loss_type"]]
    for part in parts:
        if hasattr(getattr(part, "func", part), "statistics"):
            desensitized = length_desensitized(pairs, options.get("ld_alpha", 1.0))
            with torch.no_grad():
                pairs = replace(desensitized, extras_P=part.func.match(part.func.statistics(desensitized)))
            options = {key: value for key, value in options.items() if key != "ld_alpha"}
    weighted = list(zip(parts, options.get("loss_weights", [1.0] * len(parts)), strict=True))
    out = losses.combine(pairs, losses=weighted, ld_alpha=options.get("ld_alpha", 1.0))
    check(case, out.loss_sum, out.count, policy_K)


@cases("CPOTrainer", "ORPOTrainer")
def test_reference_free_losses(case):
    policy_K = token_values("policy").requires_grad_()
    pairs = PairLogps(policy_K, torch.zeros_like(policy_K), frozen_cells(), torch.ones(NUM))
    if case["trainer"] == "ORPOTrainer":
        loss_sum = losses.orpo(pairs, beta=BETA).loss_sum - losses.sft(pairs).loss_sum
    elif case["options"]["loss_type"] == "simpo":
        loss_sum = ours("simpo", case["options"])(pairs).loss_sum
    else:
        loss_sum = ours("cpo", case["options"])(pairs, cpo_alpha=0.0).loss_sum
    check(case, loss_sum, NUM, policy_K)


@cases("KTOTrainer")
def test_unpaired_losses(case):
    options, cell_K = case["options"], frozen_cells()
    policy_K, ref_K = token_values("policy").requires_grad_(), token_values("ref")
    own = cell_K % 2 == 0  # the other half are the mismatched completions
    mismatched = PairLogps(policy_K.detach(), ref_K, cell_K, torch.ones(NUM))
    baseline = ((mismatched.policy_P2 - mismatched.ref_P2)[:, 1] + options.get("kl_shift", 0.0)).mean().clamp(min=0)
    completions = UnpairedLogps(policy_K[own], ref_K[own], cell_K[own] // 2, torch.tensor(FROZEN["desirable"]), {"kl": baseline.expand(NUM)})
    if options["loss_type"] == "kto":
        weights = {"lambda_d": options.get("desirable_weight", 1.0), "lambda_u": options.get("undesirable_weight", 1.0)}
        out = losses.kto(completions, beta=BETA, **weights)
    else:
        out = losses.apo_zero_unpaired(completions, beta=BETA)
    assert (baseline > 0) == ("kl_shift" in options)
    check(case, out.loss_sum, out.count, policy_K)


def test_every_loss_of_trl_is_here():
    assert FROZEN["trl"].startswith("1.16.")
    seen = {name for case in FROZEN["cases"] if case["trainer"] == "DPOTrainer" for name in case["options"]["loss_type"]}
    assert seen == {
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"),
        *("discopop", "sft", "sigmoid_norm"),
    }
