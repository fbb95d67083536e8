"""Losses that need more than the log-probabilities of their pack, in whole runs: against transformers one sequence at a time, at every layout.

Single completions: KTO's baseline from mismatched completions, BCO's running mean. WPO: the weights from each token's whole distribution.
"""

import json
import math
from pathlib import Path
from statistics import fmean

import pytest
import torch
from distributed_run import run_distributed
from tiny_runs import make_inputs, metrics_of, options, run_training

from megapref.batch import TokenCompletion
from megapref.config import Source
from megapref.data.chat import load_tokenizer
from megapref.data.mixture import step_rows
from megapref.data.offline import load_pairs, mismatched

BETA, BATCH, SEED = 0.5, 5, 3
LAYOUTS = {"one process": (1, {}), "dp2": (2, {}), "tp2": (2, {"tensor": 2}), "pp2": (2, {"pipeline": 2})}
LOSSES = {
    "kto": {"function": "losses:kto", "params": {"beta": BETA, "lambda_d": 3.0, "lambda_u": 0.1}},
    "bco": {"function": "losses:bco", "params": {"beta": BETA}},
    "wpo": {"function": "losses:combine", "params": {"weigh_by_policy": True, "losses": [{"function": "losses:dpo", "params": {"beta": BETA}}]}},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """`runs(loss, layout, steps)`: the directory of a run, made once."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def run(loss: str, layout: str, steps: int) -> Path:
        if (loss, layout, steps) not in made:
            run_dir = folder / f"{loss} {layout} {steps}"
            world, parallel = LAYOUTS[layout]
            optimizer = {"schedule": "constant", "warmup_steps": 0, "lr": 5e-3}
            groups = {"parallel": parallel, "loss": LOSSES[loss], "train": {"steps": steps}, "optimizer": optimizer, "save": {"export": True}}
            assert run_distributed(run_training, world, options(inputs, run_dir, "offline", **groups)) == [""] * world
            made[loss, layout, steps] = run_dir
        return made[loss, layout, steps]

    return run


def rows_of_step(inputs, step: int, unpaired: bool) -> list:
    rows, _ = load_pairs([Source(inputs["pairs"])], load_tokenizer(inputs["model"]), unpaired=unpaired)
    return [rows[i] for i in step_rows(rows.sizes, global_batch_size=BATCH, step=step, seed=SEED)]


def logits_of(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logits(prompt, completion) -> torch.Tensor:
        """[completion tokens, V]"""
        with torch.no_grad():
            return model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]

    return logits


def log_ratios(policy, reference, rows: list[TokenCompletion]) -> list[float]:
    def total(logits, row) -> float:
        return logits(row.prompt_ids, row.ids).log_softmax(-1).gather(1, torch.tensor(list(row.ids))[:, None]).sum().item()

    return [total(policy, row) - total(reference, row) for row in rows]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(("loss", "trained"), [("kto", 1), ("bco", 2)])
def test_losses_of_single_completions(inputs, runs, loss, trained):
    """The step after some that are `trained`: its policy is what they leave."""
    *before, measured = metrics_of(runs(loss, "one process", 3))[1 : trained + 2]
    reference, policy = logits_of(inputs["model"]), logits_of(runs(loss, "one process", trained) / "hf")
    rows = rows_of_step(inputs, trained, unpaired=True)
    ratios = log_ratios(policy, reference, rows)
    if loss == "kto":
        following = [next(r for r in rows[i + 1 :] + rows[:i] if list(r.prompt_ids) != list(row.prompt_ids)) for i, row in enumerate(rows)]
        others = [TokenCompletion(row.prompt_ids, other.ids, True) for row, other in zip(rows, following, strict=True)]
        baseline = max(0.0, fmean(log_ratios(policy, reference, others)))
        assert measured["kto/kl"] == pytest.approx(baseline, rel=1e-4) and baseline > 0.01
        gains = [(r - baseline) * (1 if row.desirable else -1) for r, row in zip(ratios, rows, strict=True)]
        expected = fmean((3.0 if row.desirable else 0.1) * (1 - sigmoid(BETA * gain)) for gain, row in zip(gains, rows, strict=True))
    else:
        delta = BETA * fmean(record["objective/kl"] for record in before)
        assert abs(delta) > 1e-3
        gains = [(BETA * r - delta) * (1 if row.desirable else -1) for r, row in zip(ratios, rows, strict=True)]
        expected = fmean(-math.log(sigmoid(gain)) for gain in gains)
    assert measured["loss"] == pytest.approx(expected, rel=1e-5)
    for name, wanted in (("rewards/chosen", True), ("rewards/rejected", False)):
        rewards = [BETA * r for r, row in zip(ratios, rows, strict=True) if row.desirable == wanted]
        assert measured[name] == pytest.approx(fmean(rewards or [0.0]), rel=1e-4)


def test_weights_of_pairs_by_the_policy(inputs, runs):
    logits = logits_of(inputs["model"])

    def alignment(prompt, completion) -> float:
        probabilities = logits(prompt, completion).double().softmax(-1)
        chosen = probabilities.gather(1, torch.tensor(list(completion))[:, None])[:, 0]
        return (chosen.log() - probabilities.square().sum(-1).log()).mean().exp().item()

    rows = rows_of_step(inputs, 0, unpaired=False)
    weights = [alignment(row.prompt_ids, row.first_ids) * alignment(row.prompt_ids, row.second_ids) for row in rows]
    assert metrics_of(runs("wpo", "one process", 3))[1]["loss"] == pytest.approx(math.log(2) * fmean(weights), rel=1e-5)


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2"])
@pytest.mark.parametrize("loss", LOSSES)
def test_at_every_layout(runs, loss, layout):
    for record, expected in zip(metrics_of(runs(loss, layout, 3)), metrics_of(runs(loss, "one process", 3)), strict=True):
        assert record.keys() == expected.keys()
        for name in [name for name in ("loss", "grad_norm", "kto/kl", "objective/kl", "validation-same_loss") if name in expected]:
            # KL is a difference of sums of log-probabilities, each of them some tens: 1e-5 of these, not of it.
            noise = 1e-5 if name == "objective/kl" else 1e-6
            assert record[name] == pytest.approx(expected[name], rel=1e-5, abs=noise), (record["step"], name)


def test_a_run_with_a_running_mean_resumes(inputs, runs, tmp_path):
    import shutil

    whole = runs("bco", "one process", 3)
    tree = json.loads(json.dumps(options(inputs, tmp_path / "run", "offline", loss=LOSSES["bco"])))
    optimizer = tree["optimizer"] | {"schedule": "constant", "warmup_steps": 0, "lr": 5e-3}
    shutil.copytree(runs("bco", "one process", 2), tmp_path / "run", ignore=shutil.ignore_patterns("hf"))
    assert run_distributed(run_training, 1, tree | {"optimizer": optimizer, "run": tree["run"] | {"resume": "auto"}}) == [""]
    assert metrics_of(tmp_path / "run")[3]["loss"] == metrics_of(whole)[3]["loss"]


def test_mismatched_completions():
    rows = [TokenCompletion([prompt], [prompt, i], bool(i % 2), [True, False]) for i, prompt in enumerate([1, 1, 2, 1])]
    assert [(row.prompt_ids, row.ids) for row in mismatched(rows, 9)] == [([1], [2, 2]), ([1], [2, 2]), ([2], [1, 3]), ([1], [2, 2])]
    assert [(row.ids, row.mask) for row in mismatched(rows, 2)] == [([2], [True]), ([2], [True]), ([1], [True]), ([2], [True])]
    same = [TokenCompletion([1], [i], True) for i in range(3)]
    assert [row.ids for row in mismatched(same, 9)] == [[1], [2], [0]]
    with pytest.raises(ValueError, match="needs two completions"):
        mismatched(same[:1], 9)
