"""The ledger of whole runs: the same at every layout, every metric recomputed from it, trained on again, replayed."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from distributed_run import run_distributed
from tiny_runs import make_inputs, metrics_of, options, replay, run_training

STEPS = 3
PENALTY = 0.25
GROUPS = {
    "train": {"steps": STEPS},
    "method": {"num_candidates": 3, "ties": "skip", "missing_eos_penalty": PENALTY},
    "save": {"every": 1, "keep": STEPS},
    "optimizer": {"warmup_steps": 0, "lr": 5e-3},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run_dir(inputs, tmp_path_factory):
    """A run of three steps on two data-parallel processes, three candidates of each of five prompts, all checkpoints kept."""
    folder = tmp_path_factory.mktemp("ledger") / "run"
    data = {"train": [{"path": inputs["prompts"]}], "validation": {}}
    assert run_distributed(run_training, 2, options(inputs, folder, "online", data=data, **GROUPS)) == ["", ""]
    return folder


def rows_of(run_dir: Path) -> list[list[dict]]:
    return [pq.read_table(path).to_pylist() for path in sorted((run_dir / "ledger").glob("*.parquet"))]


def test_every_comparison_is_in_it(inputs, run_dir):
    steps = rows_of(run_dir)
    assert [len(rows) for rows in steps] == [15] * STEPS  # three comparisons of each of five prompts
    for number, rows in enumerate(steps, 1):
        assert [row["number"] for row in rows] == list(range(15))
        assert {(row["step"], row["weight_version"], row["seed"]) for row in rows} == {(number, number - 1, 3)}
        assert [(row["first_side"], row["second_side"]) for row in rows[:3]] == [(0, 1), (0, 2), (1, 2)]
        assert {row["first_model"] for row in rows} == {"policy"}
        assert 0 < sum(row["trained"] for row in rows) <= 5
        assert sum(row["trained"] for row in rows) == metrics_of(run_dir)[number - 1]["num_pairs"]


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}], ids=str)
def test_it_is_the_same_at_every_layout(inputs, run_dir, tmp_path, parallel):
    data = {"train": [{"path": inputs["prompts"]}], "validation": {}}
    tree = options(inputs, tmp_path / "run", "online", data=data, **{**GROUPS, "save": {}}, parallel=parallel)
    assert set(run_distributed(run_training, 2 if parallel else 1, tree)) == {""}
    assert rows_of(tmp_path / "run") == rows_of(run_dir)


def export_checkpoints(model: str, run_dir: Path) -> None:
    """Every checkpoint as a Hugging Face folder beside it."""
    from megapref.config import Parallel
    from megapref.convert.families import read_spec
    from megapref.convert.hf import export_hf
    from megapref.mcore import checkpoint, setup
    from megapref.mcore.model import build_model

    setup.start(Parallel(), 0)
    chunks = build_model(read_spec(model), Parallel())
    for step in range(1, STEPS):
        checkpoint.load_weights(chunks, checkpoint.path_of(run_dir / "checkpoints", step))
        export_hf(chunks, read_spec(model), model, run_dir / f"hf_{step}")


def log_probability(model, prompt_ids: list[int], ids: list[int]) -> float:
    with torch.no_grad():
        scores = model(torch.tensor([prompt_ids + ids])).logits[0].log_softmax(-1)
    return float(sum(scores[len(prompt_ids) + i - 1, token] for i, token in enumerate(ids)))


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def recomputed(rows: list[dict], policy, reference, beta: float) -> dict[str, float]:
    """What the run logs of a step, from the ledger's rows and transformers' log-probabilities alone, one completion after the other."""
    samples = {(row["prompt_index"], row[f"{side}_side"]): (row, side) for row in rows for side in ("first", "second")}
    pairs = []
    for row in (row for row in rows if row["trained"]):
        order = ("first", "second") if row["preference"] >= 0.5 else ("second", "first")
        pairs.append([{key: row[f"{side}_{key}"] for key in ("ids", "score")} | {"prompt": row["prompt_ids"]} for side in order])
    for side in (side for pair in pairs for side in pair):
        side["lp"], side["lr"] = (log_probability(model, side["prompt"], side["ids"]) for model in (policy, reference))
        side["reward"] = beta * (side["lp"] - side["lr"])
    kl = mean(side["lp"] - side["lr"] for pair in pairs for side in pair)
    scores = mean(row[f"{side}_score"] for row, side in samples.values())
    return {
        "loss": mean(float(-torch.nn.functional.logsigmoid(torch.tensor(chosen["reward"] - rejected["reward"]))) for chosen, rejected in pairs),
        "objective/kl": kl,
        "objective/entropy": -mean(side["lp"] for pair in pairs for side in pair),
        "objective/non_score_reward": -beta * kl,
        "objective/scores": scores,
        "objective/rlhf_reward": scores - beta * kl,
        "objective/scores_margin": mean(chosen["score"] - rejected["score"] for chosen, rejected in pairs),
        "rewards/chosen": mean(chosen["reward"] for chosen, _ in pairs),
        "rewards/rejected": mean(rejected["reward"] for _, rejected in pairs),
        "rewards/accuracies": mean(chosen["reward"] > rejected["reward"] for chosen, rejected in pairs),
        "rewards/margins": mean(chosen["reward"] - rejected["reward"] for chosen, rejected in pairs),
        "logps/chosen": mean(chosen["lp"] for chosen, _ in pairs),
        "logps/rejected": mean(rejected["lp"] for _, rejected in pairs),
        "val/contain_eos_token": mean(row[f"{side}_finished"] for row, side in samples.values()),
        "generation/length": mean(len(row[f"{side}_ids"]) for row, side in samples.values()),
        "judge/ties": mean(row["first_score"] == row["second_score"] for row in rows),
        "judge/first_preferred": mean(row["preference"] for row in rows if row["preference"] is not None),
        "judge/abstained": sum(row["preference"] is None for row in rows),
        "num_pairs": len(pairs),
        "beta": beta,
    }


def test_every_metric_is_what_ledger_and_transformers_give(inputs, run_dir):
    from tiny_runs import letters
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megapref.batch import Completion

    run_distributed(export_checkpoints, 1, inputs["model"], run_dir)
    folders = [Path(inputs["model"]), *(run_dir / f"hf_{step}" for step in range(1, STEPS))]
    policies = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders]
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    finished = set()
    for record, rows, policy in zip(metrics_of(run_dir), rows_of(run_dir), policies, strict=True):
        for name, value in recomputed(rows, policy, policies[0], beta=0.5).items():
            # Differences of log-probabilities are small beside these, which float32 rounds in the fifth digit.
            assert record[name] == pytest.approx(value, rel=1e-4, abs=2e-5), (record["step"], name)
        for row, side in ((row, side) for row in rows for side in ("first", "second")):
            ids, text, ended = (row[f"{side}_{key}"] for key in ("ids", "text", "finished"))
            finished.add(ended)
            assert text == tokenizer.decode(ids, skip_special_tokens=True) and (tokenizer.eos_token_id in ids) == ended
            (score,) = letters([None], [Completion(ids, text, ended)])
            assert row[f"{side}_score"] == pytest.approx(score - (0 if ended else PENALTY))
    assert finished == {True, False}


def test_training_offline_on_it_repeats_the_run(inputs, run_dir, tmp_path):
    """Pairs in the same order, unshuffled, are the same steps; only what was never a pair is left out."""
    pairs = [metrics["num_pairs"] for metrics in metrics_of(run_dir)]
    if len(set(pairs)) > 1:  # batches of a file are equally large
        pytest.fail(f"the run has steps of {pairs} pairs; choose other prompts")
    data = {"train": [{"path": str(run_dir / "ledger")}], "validation": {}, "shuffle": False}
    groups = {**GROUPS, "method": {"pairs": "offline"}, "save": {}, "train": {"steps": STEPS, "global_batch_size": int(pairs[0])}}
    assert run_distributed(run_training, 2, options(inputs, tmp_path / "run", "offline", data=data, **groups)) == ["", ""]
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        assert [record[name] for record in metrics_of(tmp_path / "run")] == [record[name] for record in metrics_of(run_dir)], name


def test_replay(run_dir, tmp_path, capfd):
    copy = Path(shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("hf_*")))
    shutil.rmtree(copy / "checkpoints" / "step_000002")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert run_distributed(replay, 2, str(copy), "--step", "3", "--tolerance", "0") == [0, 0]  # the run's layout: the same bits
    assert run_distributed(replay, 1, str(copy), "--step", "3") == [0]
    assert run_distributed(replay, 1, str(copy), "--step", "1") == [0]  # from the first model
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    table = pq.read_table(copy / "ledger" / "step_000002.parquet")
    swapped = table.set_column(table.schema.get_field_index("preference"), "preference", [[p and 1 - p for p in table["preference"].to_pylist()]])
    pq.write_table(swapped, copy / "ledger" / "step_000002.parquet")
    assert run_distributed(replay, 1, str(copy), "--step", "3") == [1]  # its second step went elsewhere
    (copy / "ledger" / "step_000002.parquet").unlink()
    assert run_distributed(replay, 2, str(copy), "--step", "3") == [2, 2]
    assert run_distributed(replay, 1, str(copy), "--step", "9") == [2]
