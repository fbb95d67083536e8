"""Evaluation in whole runs: every kind of opponent, greedy samples, sets apart, KL as transformers has it, the same at every layout."""

import json
from pathlib import Path

import pytest
import torch
from distributed_run import run_distributed
from tiny_runs import PROMPTS, make_inputs, metrics_of, options, run_training, write_rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """A run of one step with a checkpoint and an export, and two validation sets, greedy; on two processes."""
    folder = tmp_path_factory.mktemp("trained")
    sets = {"first": PROMPTS[:3], "other": PROMPTS[3:7]}
    validation = {name: {"path": write_rows(folder / f"{name}.jsonl", [{"prompt": p} for p in own])} for name, own in sets.items()}
    train = {"steps": 1, "global_batch_size": 4}
    groups = {"train": train, "optimizer": {"lr": 2e-2, "warmup_steps": 0, "eps": 1e-3}, "evaluation": {"temperature": 0.0}, "save": {"export": True}}
    tree = options(inputs, folder / "run", "online", data={"validation": validation}, **groups)
    assert run_distributed(run_training, 2, tree) == ["", ""]
    return folder / "run"


def rows_of(run_dir: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "samples" / f"evaluation_{step:06}.jsonl").read_text().splitlines()]


def logps(model, prompt_ids: list[int], ids: list[int]) -> float:
    with torch.no_grad():
        scores = model(torch.tensor([prompt_ids + ids])).logits[0].log_softmax(-1)
    return float(sum(scores[len(prompt_ids) + i - 1, token] for i, token in enumerate(ids)))


def greedy(model, prompt_ids: list[int], eos: int) -> list[int]:
    ids = model.generate(torch.tensor([prompt_ids]), max_new_tokens=8, do_sample=False, eos_token_id=eos, pad_token_id=eos)
    return ids[0, len(prompt_ids) :].tolist()


def test_greedy_samples_and_kl_are_those_of_transformers(inputs, trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (trained / "hf", inputs["model"]))
    rows, kl = rows_of(trained, 1), []
    assert [row["prompt"] for row in rows] == PROMPTS[:7] and {row["against"] for row in rows} == {"reference"}
    for row in rows:
        prompt_ids = tokenizer(row["prompt"])["input_ids"]
        ids = greedy(policy, prompt_ids, tokenizer.eos_token_id)
        assert row["policy"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert row["opponent"] == tokenizer.decode(greedy(reference, prompt_ids, tokenizer.eos_token_id), skip_special_tokens=True)
        kl.append(logps(policy, prompt_ids, ids) - logps(reference, prompt_ids, ids))
    assert min(map(abs, kl)) > 1e-3
    start, end = metrics_of(trained)
    assert start["eval/kl"] == 0.0 and start["eval/win_rate"] == 0.5
    assert end["eval/kl"] == pytest.approx(sum(kl) / 7, rel=1e-4)
    assert end["validation-first_kl"] == pytest.approx(sum(kl[:3]) / 3, rel=1e-4)
    assert end["validation-other_kl"] == pytest.approx(sum(kl[3:]) / 4, rel=1e-4)
    for name, own in (("first", rows[:3]), ("other", rows[3:])):
        assert end[f"validation-{name}_win_rate"] == pytest.approx(sum(row["preference"] for row in own) / len(own))
        assert end[f"validation-{name}_reward"] == pytest.approx(sum(row["score_policy"] for row in own) / len(own))


def against(inputs, run_dir: Path, who: str, world: int = 1, **groups) -> str:
    """Trains a step from the first model with another opponent."""
    evaluation = {"temperature": 0.0, "against": str(who), "answers": "chosen"}
    tree = options(inputs, run_dir, "online", train={"steps": 1, "global_batch_size": 4}, evaluation=evaluation, **groups)
    first, *others = run_distributed(run_training, world, tree)
    assert set(others) <= {first}
    return first


def test_a_checkpoint_and_its_export_are_the_same_opponent(inputs, trained, tmp_path):
    assert against(inputs, tmp_path / "checkpoint", trained / "checkpoints" / "step_000001", 2, parallel={"pipeline": 2}) == ""
    assert against(inputs, tmp_path / "hf", trained / "hf") == ""
    rows = rows_of(tmp_path / "hf", 0)
    assert rows == [row | {"against": str(trained / "hf")} for row in rows_of(tmp_path / "checkpoint", 0)]
    # The trained policy's samples are those of its own run; the untrained ones here are the opponent's there.
    assert [(row["opponent"], row["policy"]) for row in rows] == [(row["policy"], row["opponent"]) for row in rows_of(trained, 1)[:3]]


def test_own_answers_need_no_reference(inputs, tmp_path):
    data = {"train": [{"path": inputs["prompts"]}], "validation": {"own": {"path": inputs["pairs"], "take": 3}}}
    loss = {"function": "losses:simpo", "params": {}}
    assert against(inputs, tmp_path / "run", "rows", 2, data=data, reference={"mode": "none"}, loss=loss) == ""
    pairs = [json.loads(line) for line in Path(inputs["pairs"]).read_text().splitlines()]
    assert [row["opponent"] for row in rows_of(tmp_path / "run", 1)] == [pair["chosen"] for pair in pairs[:3]]
    assert "eval/kl" not in metrics_of(tmp_path / "run")[1] and "validation-own_win_rate_low" in metrics_of(tmp_path / "run")[1]


def test_opponents_that_do_not_fit_are_named_before_training(inputs, tmp_path):
    from tiny_models import make_checkpoint
    from tiny_tokenizers import save_tokenizer

    assert "evaluation.answers=chosen: expected an answer" in against(inputs, tmp_path / "a", "rows", 2)
    save_tokenizer(tmp_path / "other", eos="<|im_start|>")
    make_checkpoint(tmp_path / "other", "qwen2", max_position_embeddings=8)
    message = against(inputs, tmp_path / "b", tmp_path / "other", 2)
    assert "evaluation.against=" in message and "has 8 positions" in message
    make_checkpoint(tmp_path / "bare", "qwen2")
    assert str(tmp_path / "bare") in against(inputs, tmp_path / "c", tmp_path / "bare", 2)
    assert not (tmp_path / "b" / "metrics.jsonl").exists()
