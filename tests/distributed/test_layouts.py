"""Whole runs at every layout against one process: the same samples, verdicts, losses and gradient norms over three steps, in float32."""

from pathlib import Path

import pytest
import torch
from distributed_run import run_distributed
from safetensors.torch import load_file
from tiny_runs import make_inputs, metrics_of, options, run_training, samples_of

LAYOUTS = {
    "dp2": (2, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2 sequence": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "cp2": (2, {"context": 2}),
    "tp2 pp2": (4, {"tensor": 2, "pipeline": 2}),
    "tp2 sequence cp2": (4, {"tensor": 2, "sequence": True, "context": 2}),
    "dp2 tp2": (4, {"tensor": 2}),
}
MORE_LAYOUTS = {
    "dp2 pp2": (4, {"pipeline": 2}),
    "pp2 uneven": (2, {"pipeline": 2, "first_stage_layers": 1}),
    "cp2 recompute": (2, {"context": 2, "recompute": "full"}),
}
# Of a mixture of experts. The ranks that share experts are data-parallel ranks where nothing else is said.
EXPERT_LAYOUTS = {
    "ep2": (2, {"expert": 2}),
    "dp2 ep2": (4, {"expert": 2}),
    "pp2 ep2": (4, {"pipeline": 2, "expert": 2}),
    "tp2": (2, {"tensor": 2, "sequence": True}),
    "tp2 ep2 whole": (2, {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1}),
    "tp2 ep2": (4, {"tensor": 2, "sequence": True, "expert": 2}),
    "cp2 ep2": (2, {"context": 2, "expert": 2, "recompute": "full"}),
}
# Sampled with a copy of the weights, in parts: under virtual stages and context parallelism in any case.
SAMPLED_IN = {"tp2 pp2": 1, "pp2": 1}
OF_METHODS = ("loss/dpo", "loss/xpo", "loss/kl", "loss/score", "scores/policy", "scores/reference", "scores/mixture")
OF_METHODS += ("moe/aux_loss", "moe/load_max")
SAME = ("loss", "grad_norm", "logps/chosen", "logps/rejected", "objective/scores", "eval/reward", "validation-same_loss", *OF_METHODS)
# Batches of 5 of 8 prompts: the third step is in the second epoch.
LISTS = {"beta": [0.5, 0.2], "alpha": [0.1, 0.02], "mixture_coef": [0.3, 0.8]}
MIXTURE = {"candidates": "policy_mixture", "mixture_coef": LISTS["mixture_coef"]}
BETA = {"beta": LISTS["beta"]}
BALANCED, FROZEN = ({"moe": {name: value}} for name, value in (("router_aux_loss_coef", 0.1), ("freeze_router", True)))
KINDS = {
    "xpo": {"method": {"candidates": "policy_reference"}, "loss": {"function": "losses:xpo", "params": BETA | {"alpha": LISTS["alpha"]}}},
    "nash_md": {"method": MIXTURE | {"soft_preference": True}, "loss": {"function": "losses:nash_md", "params": BETA}},
    "online_dpo against the mixture": {"method": MIXTURE, "loss": {"function": "losses:dpo", "params": BETA}},
    "experts offline": {"model": BALANCED},
    "experts online": {"model": FROZEN},
    "experts nash_md": {
        "model": BALANCED,
        "method": MIXTURE | {"soft_preference": True},
        "loss": {"function": "losses:nash_md", "params": {"beta": 0.5}},
    },
    # One pair in the first step, none in the second, three in the third, whatever rank had their prompts.
    "uneven": {
        "judge": {"function": "tiny_runs:picky", "params": {"keep": [0, 6, 7]}},
        "data": {"shuffle": False},
        "train": {"global_batch_size": 3},
    },
}
MODELS = {"online": "qwen2_tied", "offline": "llama_tied", "experts online": "qwen3_moe", "experts offline": "mixtral", "experts nash_md": "mixtral"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`runs(kind, layout)`: metrics, samples, the weights at the end and at the start of a run, made once."""
    folder = tmp_path_factory.mktemp("layouts")
    # Tied: the first and the last stage each hold the embedding, and must sum its gradients.
    inputs = {kind: make_inputs(folder / kind, model, num_hidden_layers=2 if "experts" in kind else 4) for kind, model in MODELS.items()}
    made = {}

    def run(kind: str, layout: str):
        if (kind, layout) not in made:
            world, parallel = (EXPERT_LAYOUTS if "experts" in kind else LAYOUTS | MORE_LAYOUTS).get(layout, (1, {}))
            pairs = "offline" if "offline" in kind else "online"
            groups = {"parallel": parallel, "save": {"export": True}, "evaluation": {"every": 3}, **KINDS.get(kind, {})}
            if kind != "online" and layout in SAMPLED_IN:
                groups["generation"] = {"parallel": {"tensor": SAMPLED_IN[layout]}}
            tree = options(inputs[kind if kind in inputs else pairs], folder / kind / layout, pairs, **groups)
            assert run_distributed(run_training, world, tree) == [""] * world
            weights = load_file(folder / kind / layout / "hf" / "model.safetensors")
            before = load_file(Path(tree["model"]["path"]) / "model.safetensors")
            made[kind, layout] = metrics_of(folder / kind / layout), samples_of(folder / kind / layout), weights, before
        return made[kind, layout]

    return run


def compare(metrics: list[dict], single: list[dict]) -> None:
    assert [record["step"] for record in metrics] == [0, 1, 2, 3]
    for record, expected in zip(metrics, single, strict=True):
        assert record.keys() == expected.keys()
        for name in [name for name in SAME if expected.get(name) is not None]:
            # The KL of a mixture of experts is a difference of sums of log-probabilities, each of them some tens: 1e-5 of these, not of it.
            noise = 1e-5 if name == "loss/kl" and "moe/load_max" in record else 1e-6
            assert record[name] == pytest.approx(expected[name], rel=1e-5, abs=noise), (record["step"], name)


# The matrix: every layout for a method from files, one that samples from the policy, and one that samples from a mixture and has a judge's say.
MATRIX = [(kind, layout) for kind in ("offline", "online", "nash_md") for layout in LAYOUTS]
MATRIX += [(f"experts {kind}", layout) for kind in ("offline", "online", "nash_md") for layout in ("ep2", "dp2 ep2")]
MORE = [("offline", "pp2 uneven"), ("offline", "cp2 recompute"), ("online", "pp2 uneven")]
MORE += [("xpo", layout) for layout in ("dp2", "tp2", "cp2")] + [("online_dpo against the mixture", layout) for layout in ("dp2", "tp2")]
MORE += [("experts offline", layout) for layout in ("pp2 ep2", "tp2", "tp2 ep2", "cp2 ep2")] + [("experts online", "tp2 ep2 whole")]


@pytest.mark.parametrize(("kind", "layout"), MATRIX + MORE)
def test_runs_do_not_depend_on_the_layout(runs, kind, layout):
    metrics, samples, weights, _ = runs(kind, layout)
    single_metrics, single_samples, single_weights, _ = runs(kind, "one process")
    compare(metrics, single_metrics)
    assert len({record["loss"] for record in metrics[1:]}) == 3
    num_shares = {"ep2": 2, "tp2 ep2": 2, "pp2 ep2": 2, "dp2 ep2": 4}.get(layout, 2 if "dp2" in layout else 1)
    for step, expected in zip(samples, single_samples, strict=True):
        assert step == expected[::num_shares]  # the first rank's share
    assert weights.keys() == single_weights.keys()
    for name, tensor in weights.items():
        assert torch.dist(tensor, single_weights[name]) <= 1e-5 * single_weights[name].norm(), name


@pytest.mark.parametrize(
    ("kind", "names"), [("xpo", ["beta", "alpha"]), ("nash_md", ["beta", "mixture_coef"]), ("online_dpo against the mixture", ["mixture_coef"])]
)
def test_numbers_of_each_epoch(runs, kind, names):
    metrics, *_ = runs(kind, "dp2")
    for name in names:
        assert [record[name] for record in metrics[1:]] == pytest.approx([LISTS[name][0]] * 2 + LISTS[name][1:]), name


@pytest.mark.parametrize("layout", ["one process", "ep2"])
def test_routers_are_balanced_or_frozen(runs, layout):
    """What is logged of them, and which routers a run leaves as it found them."""
    for kind, coefficient in (("experts offline", True), ("experts online", False)):
        metrics, _, weights, before = runs(kind, layout)
        routers = [name for name in before if "gate.weight" in name]
        assert len(routers) == 2 and {torch.equal(weights[name], before[name]) for name in routers} == {not coefficient}
        assert all(("moe/aux_loss" in record) == coefficient and 1 <= record["moe/load_max"] <= 4 for record in metrics[1:])


@pytest.mark.parametrize("layout", ["dp2", "tp2 pp2", "dp2 pp2"])
def test_uneven_pairs(runs, layout):
    """A rank without pairs, fewer pairs than ranks, and a step without any."""
    metrics, *_ = runs("uneven", layout)
    compare(metrics, runs("uneven", "one process")[0])
    assert [record["num_pairs"] for record in metrics[1:]] == [1, 0, 3]
    assert [record["judge/abstained"] for record in metrics[1:]] == [2, 3, 0]
    assert [record["skipped"] for record in metrics[1:]] == [0, 1, 0]
    assert metrics[2]["loss"] is None


def test_what_a_run_on_pairs_from_files_logs(runs):
    metrics, *_ = runs("offline", "one process")
    keys = "loss grad_norm lr rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected num_pairs skipped"
    keys += " logps/ref_chosen logps/ref_rejected perf/tokens_per_s perf/pairs_per_s pack/efficiency pack/balance time/score_reference time/train"
    assert [set(keys.split()) - record.keys() for record in metrics[1:]] == [set()] * 3
    assert {f"data/{kind}_rows" for kind in ("dropped", "filtered", "truncated", "tied")} <= metrics[1].keys()
