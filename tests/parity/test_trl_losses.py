"""Losses and gradients against TRL's own, 1.16 and 0.28, frozen by trl/freeze_losses.py and trl/freeze_losses_028.py: the same batch of synthetic
log-probabilities, float32, 1e-5.

Where TRL means something else, the parameters that say the same are given here. In both:
- TRL's `sft` is the mean over all chosen tokens of the batch, ours the mean over pairs of each one's own mean: weighing each pair by its number
  of tokens per mean number of tokens makes one of the other. 0.28's `rpo_alpha` is that term too.
- CPO's `hinge` and `ipo` are ours with `reference.mode=free`; `simpo_gamma` is `gamma`.
- TRL's `cpo_loss` and `odds_ratio_loss` are without the likelihood term.
- TRL averages `ipo` over tokens: `average_log_probs`.

In 1.16:
- TRL's transforms of other f-divergences are 0 at r = 0, which only shows after division by lengths: `centered`.
- TRL's `sigmoid` ignores label_smoothing; ours is conservative DPO.

In 0.28:
- Its alpha-divergence with coefficient a is ours with `alpha` = 1 - a; there is no forward KL.
- `exo_pair` takes label_smoothing 0 as 1e-3, our default; ours refuses 0.
- delta of `bco_pair` and BCO is a running mean that has the step's own rewards in it, ours has those of the steps before: it is given here.
- `reference_free` is `reference.mode=free`: the reference's log-probabilities are 0.

Not compared of 0.28, because ours is what the papers say: its LD-DPO counts positions from the start of the prompt and leaves the reference whole,
its WPO subtracts from a token's log-probability the sum of squares of the token after it, and other f-divergences of its `ipo` transform means.
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

FILES = {"1.16": "losses.json", "0.28": "losses_028.json"}
FROZEN = {version: json.loads((Path(__file__).parent / "trl" / file).read_text()) for version, file in FILES.items()}
BETA, LENGTHS, DESIRABLE = (FROZEN["1.16"][name] for name in ("beta", "lengths", "desirable"))
NUM = len(LENGTHS)
NAMES = {"sigmoid": "dpo"}
RENAMED = {"f_divergence_type": "f_divergence", "f_alpha_divergence_coef": "alpha", "discopop_tau": "tau", "simpo_gamma": "gamma"}
OF_WHOLE_LOSS = ("loss_type", "loss_weights", "ld_alpha", "use_weighting", "rpo_alpha", "reference_free", "running_mean")


def cases(*trainers):
    chosen = [(version, case) for version, frozen in FROZEN.items() for case in frozen["cases"] if case["trainer"] in trainers]
    ids = [f"{version}-{case['trainer']}-{json.dumps(case['options'])}" for version, case in chosen]
    return pytest.mark.parametrize(("version", "case"), chosen, ids=ids)


def frozen_cells():
    """TRL's rows are all chosen, then all rejected."""
    rows = [(2 * i + side, lengths[side]) for side in (0, 1) for i, lengths in enumerate(LENGTHS)]
    return torch.tensor([cell for cell, length in rows for _ in range(length)])


def token_values(version, name):
    return torch.tensor(FROZEN[version]["tokens"][name])


def check(case, loss_sum, count, policy_K):
    loss = loss_sum / count
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    want = torch.tensor(case["grad"])
    assert torch.allclose(policy_K.grad, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())


def ours(version, name, options):
    """Our loss of TRL's name, with the parameters that say what TRL does."""
    params = {RENAMED.get(key, key): value for key, value in options.items() if key not in OF_WHOLE_LOSS}
    if name in ("hinge", "ipo", "discopop") or (version == "1.16" and name in ("sigmoid", "sigmoid_norm")):
        params.pop("label_smoothing", None)
    if version == "1.16" and name in ("sigmoid_norm", "ipo"):
        params["centered"] = True
    if version == "0.28" and params.get("alpha") is not None:
        params["alpha"] = 1 - params["alpha"]
    if name == "ipo":
        params["average_log_probs"] = True
    if name == "bco_pair" and version == "0.28":
        params["running_delta"] = True
    params = {key: value for key, value in params.items() if value is not None}
    return losses.sft if name == "sft" else partial(getattr(losses, NAMES.get(name, name)), beta=BETA, **params)


def batch_weighted_sft(pairs):
    lengths = pairs.length_P2[:, 0]
    return losses.sft(replace(pairs, extras_P={"weight": lengths / lengths.mean()}))


@cases("DPOTrainer")
def test_pair_losses(version, case):
    options = case["options"]
    policy_K, ref_K = token_values(version, "policy").requires_grad_(), token_values(version, "ref")
    pairs = PairLogps(policy_K, torch.zeros_like(ref_K) if options.get("reference_free") else ref_K, frozen_cells(), torch.ones(NUM))
    if options.get("use_weighting"):
        pairs = weighted_by_policy(replace(pairs, extras_K={"log_sum_sq": token_values(version, "log_sum_sq")}))
    if "running_mean" in options:
        pairs = replace(pairs, extras_P={"mean_log_ratio": torch.full((NUM,), options["running_mean"] / BETA)})
    parts = [batch_weighted_sft if name == "sft" else ours(version, name, options) for name in options["loss_type"]]
    for part in parts:
        if hasattr(getattr(part, "func", part), "statistics"):
            desensitized = length_desensitized(pairs, options.get("ld_alpha", 1.0))
            with torch.no_grad():
                pairs = replace(desensitized, extras_P=part.func.match(part.func.statistics(desensitized)))
            options = {key: value for key, value in options.items() if key != "ld_alpha"}
    weighted = list(zip(parts, options.get("loss_weights", [1.0] * len(parts)), strict=True))
    if "rpo_alpha" in options:
        weighted.append((batch_weighted_sft, options["rpo_alpha"]))
    out = losses.combine(pairs, losses=weighted, ld_alpha=options.get("ld_alpha", 1.0))
    check(case, out.loss_sum, out.count, policy_K)


@cases("CPOTrainer", "ORPOTrainer")
def test_reference_free_losses(version, case):
    policy_K = token_values(version, "policy").requires_grad_()
    pairs = PairLogps(policy_K, torch.zeros_like(policy_K), frozen_cells(), torch.ones(NUM))
    if case["trainer"] == "ORPOTrainer":
        loss_sum = losses.orpo(pairs, beta=BETA).loss_sum - losses.sft(pairs).loss_sum
    elif case["options"]["loss_type"] == "sigmoid":
        loss_sum = ours(version, "cpo", case["options"])(pairs, cpo_alpha=0.0).loss_sum
    else:
        loss_sum = ours(version, case["options"]["loss_type"], case["options"])(pairs).loss_sum
    check(case, loss_sum, NUM, policy_K)


@cases("KTOTrainer", "BCOTrainer")
def test_unpaired_losses(version, case):
    options, cell_K = case["options"], frozen_cells()
    policy_K, ref_K = token_values(version, "policy").requires_grad_(), token_values(version, "ref")
    own = cell_K % 2 == 0  # the other half are the mismatched completions
    mismatched = PairLogps(policy_K.detach(), ref_K, cell_K, torch.ones(NUM))
    baseline = ((mismatched.policy_P2 - mismatched.ref_P2)[:, 1] + options.get("kl_shift", 0.0)).mean().clamp(min=0)
    extras = {"kl": baseline.expand(NUM), "mean_log_ratio": torch.full((NUM,), options.get("running_mean", 0.0) / BETA)}
    completions = UnpairedLogps(policy_K[own], ref_K[own], cell_K[own] // 2, torch.tensor(DESIRABLE), extras)
    weights = {ours: options[name] for name, ours in (("desirable_weight", "lambda_d"), ("undesirable_weight", "lambda_u")) if name in options}
    out = getattr(losses, options["loss_type"])(completions, beta=BETA, **weights)
    assert (baseline > 0) == ("kl_shift" in options)
    check(case, out.loss_sum, out.count, policy_K)


def test_every_loss_of_trl_is_here():
    both = {
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"),
        *("discopop", "sft"),
    }
    for version, frozen in FROZEN.items():
        assert frozen["trl"].startswith(version + ".")
        seen = {name for case in frozen["cases"] if case["trainer"] == "DPOTrainer" for name in case["options"]["loss_type"]}
        assert seen == both | ({"sigmoid_norm"} if version == "1.16" else set())
