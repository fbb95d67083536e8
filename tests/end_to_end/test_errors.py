"""What a user can get wrong, as it meets a run on two processes: one message, the same on both, no hang, nothing overwritten."""

import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_run import run_distributed
from tiny_runs import make_inputs, metrics_of, options, run_training, write_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def the_message(tree: dict) -> str:
    """What both ranks raise; it fits on a screen."""
    first, second = run_distributed(run_training, 2, tree)
    assert first == second
    assert 0 < len(first.splitlines()) <= 8 and len(first) < 2000
    return first


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def broken_reward(prompts, completions, *, how: str) -> list[float]:
    """Is wrong where prompt 1 is, which is on one rank."""
    values = [float(len(c.ids)) for c in completions]
    if any(prompt.index == 1 for prompt in prompts):
        if how == "raises":
            raise KeyError("no such adjective")
        values = {"short": values[1:], "nan": [math.nan, *values[1:]], "text": ["good", *values[1:]], "nothing": None}[how]
    return values


def broken_judge(prompts, first, second) -> list[float]:
    return [1 / len([p for p in prompts if p.index != 1][:0]) for _ in prompts]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", ["KeyError", "no such adjective", "test_errors.py", "in broken_reward", "raise KeyError"]),
        ("short", ["values for", "rows", "a list"]),
        ("nan", ["nan", "row 0", "finite"]),
        ("text", ["'good'", "row 0"]),
        ("nothing", ["NoneType"]),
    ],
)
def test_wrong_reward(inputs, tmp_path, how, said):
    reward = {"letters": {"function": "test_errors:broken_reward", "params": {"how": how}}}
    # On one rank alone: prompts 0 and 1 are dealt out to the two.
    groups = {"reward": reward, "data": {"shuffle": False}, "train": {"global_batch_size": 2}}
    message = the_message(options(inputs, tmp_path / "run", "online", **groups))
    assert message.startswith("reward.letters") and all(part in message for part in said)


def test_judge_that_raises(inputs, tmp_path):
    message = the_message(options(inputs, tmp_path / "run", "online", judge={"function": "test_errors:broken_judge"}))
    assert message.startswith("judge") and "ZeroDivisionError" in message and "in broken_judge" in message


def wrong_inputs(inputs: dict[str, str], folder: Path) -> dict[str, tuple[dict, list[str]]]:
    """Overrides of a run's config by what is wrong with them, and what the message must name."""
    no_prompt = write_rows(folder / "no_prompt.jsonl", [{"prompt": "the cat"}, {"question": "who?"}])
    long = write_rows(folder / "long.jsonl", [{"prompt": "the cat"}, {"prompt": "q7" * 40}])
    other = folder / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"]}))
    (folder / "file").write_text("mine")
    scaled = folder / "scaled"
    scaled.mkdir()
    for path in Path(inputs["model"]).iterdir():
        (scaled / path.name).symlink_to(path)
    (scaled / "config.json").unlink()
    config = json.loads((Path(inputs["model"]) / "config.json").read_text())
    (scaled / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}))
    return {
        "row without prompt": ({"data": {"train": [{"path": no_prompt}]}}, [no_prompt, "row 2", "prompt", "data.on_bad_row"]),
        "prompt longer than the pack": ({"data": {"train": [{"path": long}]}}, [long, "row 2", "pack.max_tokens"]),
        "longer than the model": ({"generation": {"max_new_tokens": 600}, "pack": {"max_tokens": 2000}}, ["max_position_embeddings", "512"]),
        "no such model": ({"model": {"path": "nobody/nothing"}}, ["model.path=nobody/nothing"]),
        "unsupported architecture": ({"model": {"path": str(other)}}, ["gpt_neo"]),
        "unsupported field": ({"model": {"path": str(scaled)}}, ["yarn"]),
        "run directory under a file": ({"run": {"dir": str(folder / "file" / "run")}}, ["run.dir=", "file"]),
        "no tokenizer": ({"model": {"tokenizer": str(other)}}, ["model.tokenizer=", str(other)]),
        "no checkpoint": ({"run": {"resume": str(other)}}, ["run.resume", str(other)]),
    }


@pytest.mark.parametrize("pairs", ["online"])
def test_wrong_inputs(inputs, tmp_path, pairs):
    for number, (what, (groups, said)) in enumerate(wrong_inputs(inputs, tmp_path).items()):
        message = the_message(options(inputs, tmp_path / f"run{number}", pairs, **groups))
        assert all(part in message for part in said), (what, message)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("sign", ["metrics.jsonl", "checkpoints/step_000001/manifest.json", "hf/config.json", "config.yaml"])
def test_existing_run_is_not_touched(inputs, tmp_path, sign):
    (tmp_path / sign).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / sign).write_text("{}\n")
    before = files_in(tmp_path)
    message = the_message(options(inputs, tmp_path, "offline", save={"export": True}))
    assert f"run.dir={tmp_path}" in message
    assert files_in(tmp_path) == before


def nan_loss(pairs, *, how: str, bad: list[int]):
    """DPO whose loss, or whose gradient alone, is not finite in some of the calls, which are counted."""
    from megapref import losses

    nan_loss.calls += 1
    output = losses.dpo(pairs, beta=0.5)
    if nan_loss.calls not in bad:
        return output
    zero = (pairs.policy_K - pairs.policy_K.detach()).sum()  # 0, and so is the root, but not the root's slope
    poison = zero * math.nan if how == "loss" else zero.abs().sqrt()
    return type(output)(output.loss_sum + poison, output.count, output.metric_sums)


nan_loss.calls = 0


def train_and_compare(tree: dict) -> tuple[str, bool]:
    """The run's message, and whether weights and moments are, bit for bit, those it began with."""
    from megapref.config import Config
    from megapref.mcore import setup
    from megapref.runlog import RunLog
    from megapref.schema import build
    from megapref.train import build as build_run
    from megapref.train import train

    def tensors():
        entries = [entry for part in run.state.optimizer.chained_optimizers for entry in part.optimizer.state.values()]
        moments = [value for entry in entries for value in entry.values() if value.any()]
        return [p.detach().clone() for chunk in run.state.chunks for p in chunk.parameters()], moments

    nan_loss.calls = 0
    cfg = build(Config, tree, [])
    setup.start(cfg.parallel, 0)
    run = build_run(cfg, None)
    weights, _ = tensors()
    message = ""
    run_dir = Path(cfg.run.dir)
    run_dir.mkdir(exist_ok=True)
    try:
        train(cfg, run, RunLog(run_dir if setup.is_first_rank() else None, total_steps=cfg.train.steps, tensorboard=False))
    except ValueError as error:
        message = str(error)
    after, moments = tensors()
    return message, not moments and all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_non_finite_steps_change_nothing_and_stop_the_run(inputs, tmp_path, how):
    groups = {
        "loss": {"function": "test_errors:nan_loss", "params": {"how": how, "bad": list(range(1, 100))}},
        "train": {"steps": 9, "max_bad_steps": 2, "global_batch_size": 2},
        "evaluation": {"every": 0},
        "data": {"validation": {}},
    }
    (first, unchanged), (second, also) = run_distributed(train_and_compare, 2, options(inputs, tmp_path / "run", "offline", **groups))
    assert first == second and unchanged and also
    assert "2 steps in a row" in first and "train.max_bad_steps=2" in first and "nan" in first
    assert [record["skipped"] for record in metrics_of(tmp_path / "run")] == [1.0, 1.0]


def test_single_bad_steps_do_not_stop_the_run(inputs, tmp_path):
    """Bad steps 1 and 3 of 4, one pack each: skipped, counted, and the others train."""
    groups = {
        "loss": {"function": "test_errors:nan_loss", "params": {"how": "loss", "bad": [1, 3]}},
        "train": {"steps": 4, "max_bad_steps": 2, "global_batch_size": 2},
        "evaluation": {"every": 0},
        "data": {"validation": {}},
    }
    ((message, unchanged),) = run_distributed(train_and_compare, 1, options(inputs, tmp_path / "run", "offline", **groups))
    assert message == "" and not unchanged
    records = metrics_of(tmp_path / "run")
    assert [record["skipped"] for record in records] == [1.0, 0.0, 1.0, 0.0]
    assert [record["loss"] is None for record in records] == [True, False, True, False]


def train_with_another_policy(tree: dict) -> str:
    """A run whose policy is not its reference."""
    from megapref import build

    resident = build.reference.resident

    def spoil(chunks):
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.mul_(1.01)
        return resident(chunks)

    build.reference.resident = spoil
    try:
        return run_training(tree)
    finally:
        build.reference.resident = resident


def test_first_update_needs_policy_and_reference_to_agree(inputs, tmp_path):
    first, second = run_distributed(train_with_another_policy, 2, options(inputs, tmp_path / "run", "offline"))
    assert first == second
    measured = metrics_of(tmp_path / "run")[1]
    assert "0.693147" in first and str(measured["rewards/chosen"]) in first and f"{measured['loss']:.6f}" in first
    assert not (tmp_path / "run" / "checkpoints").exists()


def fail_on_rank_1(tree: dict, where: str) -> str:
    """A run of which rank 1 alone cannot read a file, or rank 0 alone cannot write any more."""
    from megapref import sources

    load_data, limits = sources.load_data, resource.getrlimit(resource.RLIMIT_FSIZE)
    rank = int(os.environ["RANK"])

    def load(*args):
        if where == "reading" and rank == 1:
            raise OSError(5, "Input/output error", "pairs.jsonl")
        return load_data(*args)

    sources.load_data = load
    if where == "writing" and rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        return run_training(tree)
    finally:
        sources.load_data = load_data
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("where", "said"), [("reading", "pairs.jsonl"), ("writing", "run.dir=")])
def test_trouble_of_one_rank_ends_both(inputs, tmp_path, where, said):
    first, second = run_distributed(fail_on_rank_1, 2, options(inputs, tmp_path / "run", "offline", train={"steps": 30}), where)
    assert first == second and said in first


def test_torchrun_ends_with_an_exit_code_and_the_users_line(inputs, tmp_path):
    (tmp_path / "my_rewards.py").write_text("def kind(prompts, completions):\n    return [c.mood for c in completions]\n")
    overrides = {
        "run.dir": tmp_path / "run",
        "model.path": inputs["model"],
        "data.train": f"[{{path: {inputs['prompts']}}}]",
        "~data.validation": None,
        "reward": None,
        "+reward.mine.function": "my_rewards:kind",
        "generation.max_new_tokens": 8,
        "train.global_batch_size": 4,
    }
    words = [key if value is None and key.startswith("~") else f"{key}={value}" for key, value in overrides.items()]
    words = [word.replace("reward=None", "reward=null") for word in words]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "launchers/train.py", "--config-name", "online_dpo", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "reward.mine" in done.stderr and "has no attribute 'mood'" in done.stderr
    assert f"{tmp_path / 'my_rewards.py'}:2 in kind" in done.stderr and "return [c.mood for c in completions]" in done.stderr
