"""The demo as a newcomer starts it, shortened: the policy gets better than its reference, and everything the run promises is there."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [f"run.dir={folder}", f"train.steps={STEPS}", "save.every=10", f"evaluation.every={STEPS}", "evaluation.max_prompts=64"]
    options += ["profile.steps=[10]", "profile.ranks=[1]"]
    command = [*torchrun, "launchers/train.py", "--config-name", "online_dpo", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "console.txt").write_text(done.stdout)
    return folder


def metrics_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_policy_gets_better_than_its_reference(run_dir):
    before, *_, after = [record for record in metrics_of(run_dir) if "eval/reward" in record]
    assert (before["step"], after["step"]) == (0, STEPS)
    # The policy is the reference, but draws other samples.
    assert before["eval/reward"] == pytest.approx(before["eval/reward_opponent"], abs=0.2)
    assert after["eval/reward_opponent"] == before["eval/reward_opponent"]
    assert after["eval/reward"] > before["eval/reward_opponent"] + 0.25
    assert after["eval/win_rate_low"] > 0.5


@pytest.mark.slow
def test_first_step_and_what_every_step_says(run_dir):
    records = metrics_of(run_dir)
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    assert records[1]["loss"] == pytest.approx(0.693147, abs=1e-4)
    keys = "loss grad_norm lr rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen logps/rejected"
    keys += " objective/kl objective/scores objective/scores_margin val/contain_eos_token num_pairs skipped beta"
    keys += " pack/efficiency pack/balance perf/tokens_per_s time/generate time/judge time/score_reference time/train"
    keys += " memory/generate_gib memory/judge_gib memory/score_reference_gib memory/train_gib"
    for record in records[1:]:
        assert not set(keys.split()) - record.keys(), record["step"]
        assert record["skipped"] == 0 and record["grad_norm"] > 0


@pytest.mark.slow
def test_run_directory_holds_what_is_promised(run_dir):
    assert "online" in (run_dir / "config.yaml").read_text()
    assert json.loads((run_dir / "environment.json").read_text())["world_size"] == 2
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_000020", f"step_{STEPS:06d}"]  # save.keep=2
    assert list((run_dir / "tensorboard").glob("events.*"))
    (row, *_) = [json.loads(line) for line in (run_dir / "samples" / "step_000010.jsonl").read_text().splitlines()]
    assert row.keys() == {"prompt", "first", "second", "score_first", "score_second", "preference"}
    assert (run_dir / "samples" / f"evaluation_{STEPS:06d}.jsonl").exists()
    console = (run_dir / "console.txt").read_text()
    assert f"step {STEPS}/{STEPS}" in console and str(run_dir / "hf") in console


@pytest.mark.slow
def test_trace_of_a_step_names_its_phases_and_packs(run_dir):
    trace, table = sorted((run_dir / "profile").iterdir())
    assert (trace.name, table.name) == ("step_000010_rank_1.json.gz", "step_000010_rank_1.txt")
    with gzip.open(trace) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"pairs", "generation", "judging", "reference", "training", "writing", "saving"} <= names
    assert {"pack: forward", "pack: head and loss", "pack: backward", "aten::mm"} <= names
    assert "generation" in table.read_text() and "Self CPU time total" in table.read_text()


def final_logits(ids: list[int], model: str, path: Path) -> list[float]:
    """The logits of a checkpoint's policy, in Core, in a process of its own."""
    from megapref.config import Parallel
    from megapref.convert.families import read_spec
    from megapref.mcore import checkpoint, setup
    from megapref.mcore.model import build_model

    setup.start(Parallel(), 0)
    chunks = build_model(read_spec(model), Parallel())
    checkpoint.load_weights(chunks, path)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        return chunks[0].eval()(tokens, torch.arange(len(ids))[None], None)[0].tolist()


@pytest.mark.slow
def test_export_is_the_final_policy_in_transformers(run_dir):
    from distributed_run import run_distributed
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run_dir / "hf")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "hf", dtype=torch.float32)
    ids = tokenizer("Write a short review of a book about gardens.")["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    (expected,) = run_distributed(final_logits, 1, ids, str(run_dir / "hf"), run_dir / "checkpoints" / f"step_{STEPS:06d}")
    torch.testing.assert_close(logits, torch.tensor(expected)[:, : logits.shape[1]], rtol=1e-4, atol=1e-4)
    reference = AutoModelForCausalLM.from_pretrained(ROOT / "assets" / "demo" / "model", dtype=torch.float32)
    with torch.no_grad():
        assert (reference(torch.tensor([ids])).logits[0] - logits).abs().max() > 0.1


@pytest.mark.slow
def test_the_exported_model_answers(run_dir):
    command = [sys.executable, "tools/generate.py", str(run_dir / "hf"), "--prompt", "How was the museum?"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and len(done.stdout.replace("How was the museum?", "").split()) > 3, done.stderr[-3000:]
    stopped = subprocess.run([*command, "--stop", "e"], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert "e" in stopped.stdout[len("How was the museum?") :] and done.stdout.startswith(stopped.stdout.strip()) and stopped.stdout != done.stdout
