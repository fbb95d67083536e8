"""XPO and Nash-MD against TRL 0.28's trainers on the same completions and log-probabilities, frozen by trl/freeze_online_028.py: float32, 1e-5.

From scores, penalties and verdicts to preferences, losses, gradients and metrics. Where a metric of one name means something else, ours is compared
by what it consists of:
- TRL's logps/chosen of XPO adds policy and reference; its scores_margin is of policy and reference, ours of the preferred one and the other.
- TRL's loss/kl of Nash-MD is our objective/kl; its logps/chosen is the policy's and logps/rejected the reference's, of all samples.
- TRL looks for EOS in the prompt too, ours in the completion alone: the frozen prompts have none.
"""

import json
from pathlib import Path

import pytest
import torch

from megapref.batch import Completion, Judgement, PairLogps, Prompt
from megapref.config import Plugin
from megapref.methods import load_losses
from megapref.online.judges import decide_by_judge, decide_by_rewards
from megapref.online.pairs import compare, models_of, pair_metrics, token_pairs

FROZEN = json.loads((Path(__file__).parent / "trl" / "online_028.json").read_text())
SIDES = [FROZEN["first"], FROZEN["second"]]
NUM = len(FROZEN["prompts"])
MODELS = {"XPOTrainer": models_of("policy_reference", 2), "NashMDTrainer": models_of("policy_mixture", 2)}


def cases(trainer):
    chosen = [case for case in FROZEN["cases"] if case["trainer"] == trainer]
    return pytest.mark.parametrize("case", chosen, ids=[json.dumps(case["options"]) for case in chosen])


def contests_of(case, candidates):
    """The completions, judged as TRL judged them: XPO by ranks, Nash-MD by probabilities."""
    options, xpo = case["options"], case["trainer"] == "XPOTrainer"
    scored = [each for rows in zip(candidates, FROZEN["scores"], strict=True) for each in zip(*rows, strict=True)]
    given = {id(completion): score for completion, score in scored}
    said = [float(p >= 0.5) for p in FROZEN["judged"]] if xpo else FROZEN["judged"]
    if options.get("judged"):
        decide = decide_by_judge(lambda *_: Judgement(said, [None] * NUM), None)
    else:
        score = lambda prompts, completions: [{"given": given[id(completion)]} for completion in completions]  # noqa: E731
        decide = decide_by_rewards(score, {"given": 1.0}, options.get("missing_eos_penalty", 0.0), "first", soft_preference=not xpo)
    prompts = [Prompt(ids, "", {}, n) for n, ids in enumerate(FROZEN["prompts"])]
    return compare(prompts, candidates, MODELS[case["trainer"]], decide, "best_worst", not options.get("judged"))[0]


def ours(case, **params):
    """Loss, gradient and the means of all metrics, in TRL's order: all first completions, then all second."""
    options, first_only = case["options"], case["trainer"] == "NashMDTrainer"
    candidates = [[Completion(ids, "", ids[-1] == FROZEN["eos"]) for ids in row] for row in zip(*SIDES, strict=True)]
    contests = contests_of(case, candidates)
    pairs = [pair for contest in contests for pair in token_pairs(contest, first_only)]
    cells = [2 * n + side for side in (0, 1) for n, ids in enumerate(SIDES[side]) for _ in ids]
    policy_K = torch.tensor(FROZEN["tokens"]["policy"]).requires_grad_()
    trained = [n for n, cell in enumerate(cells) if cell % 2 == 0 or not first_only]
    ref_K, cell_K = torch.tensor(FROZEN["tokens"]["ref"])[trained], torch.tensor(cells)[trained]
    params = {"beta": options.get("beta", 0.3), **params}
    losses = load_losses(Plugin("losses:nash_md" if first_only else "losses:xpo", params))
    loss = losses[min(options.get("epoch", 0), len(losses) - 1)]
    out = loss(PairLogps(policy_K[trained], ref_K, cell_K, torch.tensor([pair.preference for pair in pairs])))
    (out.loss_sum / out.count).backward()
    metrics = {name: total / number for name, (total, number) in pair_metrics(contests, MODELS[case["trainer"]], first_only).items() if number}
    counts = {name: out.metric_sums.get(f"count {name}", out.count) for name in out.metric_sums if not name.startswith("count ")}
    metrics |= {name: float(out.metric_sums[name] / number) for name, number in counts.items() if number}
    return out, policy_K.grad, metrics


def check(case, out, grad_K, expected):
    assert len(SIDES[0]) == out.count == NUM
    assert float(out.loss_sum / out.count) == pytest.approx(case["loss"], rel=1e-5)
    want = torch.tensor(case["grad"])
    assert torch.allclose(grad_K, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())
    assert {name: case["metrics"][name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)


@cases("XPOTrainer")
def test_xpo(case):
    options = case["options"]
    out, grad_K, metrics = ours(case, alpha=options.get("alpha", 0.1), loss_type=options.get("loss_type", "sigmoid"))
    same = "loss/dpo loss/xpo objective/kl objective/entropy rewards/chosen rewards/rejected rewards/margins rewards/accuracies"
    expected = {name: metrics[name] for name in same.split()}
    expected |= {f"logps/{side}": metrics[f"logps/{side}"] + metrics[f"logps/ref_{side}"] for side in ("chosen", "rejected")}
    if not options.get("judged"):
        scores = {"objective/model_scores": metrics["scores/policy"], "objective/ref_scores": metrics["scores/reference"]}
        expected |= scores | {"objective/scores_margin": metrics["scores/policy"] - metrics["scores/reference"]}
    check(case, out, grad_K, expected)
    finished = [case["metrics"][f"val/{model}_contain_eos_token"] for model in ("model", "ref")]
    assert metrics["val/contain_eos_token"] == pytest.approx(sum(finished) / 2)


@cases("NashMDTrainer")
def test_nash_md(case):
    out, grad_K, metrics = ours(case)
    expected = {name: metrics[name] for name in ("objective/entropy", "loss/score", "rewards/probabilities")}
    expected |= {"loss/kl": metrics["objective/kl"], "rewards/margins": metrics["objective/kl"], "logps/chosen": -metrics["objective/entropy"]}
    if not case["options"].get("judged"):
        expected |= {"rewards/chosen": metrics["scores/policy"], "rewards/rejected": metrics["scores/mixture"]}
    check(case, out, grad_K, expected)


def test_what_is_frozen():
    """Both trainers, per-epoch lists past their end, both kinds of ties, and a penalty that decides a comparison."""
    assert FROZEN["trl"].startswith("0.28.") and {case["trainer"] for case in FROZEN["cases"]} == set(MODELS)
    plain, punished = (next(case for case in FROZEN["cases"] if case["options"] == options) for options in ({}, {"missing_eos_penalty": 1.0}))
    assert plain["metrics"]["rewards/chosen"] != punished["metrics"]["rewards/chosen"]
    assert any(a == b for a, b in FROZEN["scores"]) and 0.5 in FROZEN["judged"]
