"""Whole runs with tiny random models: their files, their config, and how to start them in workers and read what they wrote."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import yaml
from tiny_models import make_checkpoint
from tiny_tokenizers import save_tokenizer

PROMPTS = ["the cat", "a dog ran to", "what is two and", "hello there", "good morning", "it is", "the old house is", "three dogs"]
ANSWERS = [(" sat on the mat", " ran"), (" the house", " five and two"), (" three?", " cat"), (", good morning to you", " no")]


def make_inputs(folder: Path, model: str = "qwen2", **changes) -> dict[str, str]:
    """Paths of a model with its tokenizer, of prompts and of pairs, made in `folder`."""
    from transformers import AutoTokenizer

    folder.mkdir(exist_ok=True)
    save_tokenizer(folder / "model", chat_template=None)
    vocabulary = len(AutoTokenizer.from_pretrained(folder / "model"))
    make_checkpoint(folder / "model", model, **{"vocab_size": vocabulary, **changes})
    pairs = [{"prompt": p, "chosen": ANSWERS[i % 4][0], "rejected": ANSWERS[i % 4][1]} for i, p in enumerate(PROMPTS)]
    write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    write_rows(folder / "pairs.jsonl", pairs)
    return {name: str(folder / file) for name, file in (("model", "model"), ("prompts", "prompts.jsonl"), ("pairs", "pairs.jsonl"))}


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def options(inputs: dict[str, str], run_dir: Path, pairs: str, **groups: dict[str, Any]) -> dict[str, dict]:
    """The config of a run of a few steps, as nested dicts; `groups` are laid over its groups."""
    source = {"path": inputs["prompts" if pairs == "online" else "pairs"]}
    tree = {
        "run": {"dir": str(run_dir), "seed": 3},
        "model": {"path": inputs["model"]},
        "data": {"train": [source], "validation": {"same": {**source, "take": 3}}},
        "method": {"pairs": pairs},
        "train": {"steps": 3, "global_batch_size": 5},
        "pack": {"max_tokens": 64},
        "loss": {"function": "losses:dpo", "params": {"beta": 0.5}},
        # eps: Adam would blow gradients that are zero but for rounding up to whole updates.
        "optimizer": {"lr": 2e-3, "eps": 1e-3, "schedule": "linear", "warmup_steps": 1},
        "generation": {"max_new_tokens": 8, "temperature": 0.7, "max_requests": 16, "kv_cache_gb": 0.01},
        "evaluation": {"every": 2},
        "reward": {"letters": {"function": "tiny_runs:letters"}} if pairs == "online" else {},
        "save": {"export": False},
        "log": {"tensorboard": False, "samples_every": 1, "samples": 100},
    }
    return {name: {**tree.get(name, {}), **groups.get(name, {})} for name in {**tree, **groups}}


def letters(prompts, completions) -> list[float]:
    """A reward without ties, almost: the mean code of a completion's characters."""
    return [sum(map(ord, c.text)) / (100 * len(c.text)) if c.text else 0.0 for c in completions]


def picky(prompts, first, second, *, keep: list[int]) -> list[float | None]:
    """A judge that prefers the first completion of the prompts `keep` and abstains on the others."""
    return [0.9 if prompt.index in keep else None for prompt in prompts]


def patient_dpo(pairs, *, beta: float, run_dir: str, step: int):
    """DPO that in the given step waits until it is asked to stop, once in the life of the run."""
    from megapref import losses, signals

    done, metrics = Path(run_dir) / "waited", Path(run_dir) / "metrics.jsonl"
    if not done.exists() and metrics.exists() and metrics_of(Path(run_dir))[-1]["step"] == step - 1:
        assert signals.noted_within(300), "nobody asked this run to stop"
        done.touch()
    return losses.dpo(pairs, beta=beta)


def plain_dpo(pairs, *, beta: float):
    from megapref import losses

    return losses.dpo(pairs, beta=beta)


def fails_on_rank_1(pairs, *, beta: float):
    from megapref import losses

    if os.environ["RANK"] == "1":
        raise RuntimeError("rank 1 has had enough")
    return losses.dpo(pairs, beta=beta)


def run_training(tree: dict[str, dict]) -> str:
    """Runs `megapref.train.main`, in a worker; returns the message of its ValueError, or an empty string."""
    from megapref.config import Config
    from megapref.schema import build
    from megapref.train import main

    errors: list[str] = []
    cfg = build(Config, tree, errors)
    assert not errors, errors
    try:
        main(cfg)
    except ValueError as error:
        return str(error)
    return ""


def replay(*arguments: str) -> int:
    """The exit code of tools/replay.py, run in a worker."""
    spec = importlib.util.spec_from_file_location("replay", Path(__file__).parents[1] / "tools" / "replay.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(list(arguments))


def write_recipe(folder: Path, tree: dict[str, dict]) -> list[str]:
    """The arguments for a launcher that make it run a config, which becomes a recipe in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return ["--config-name=tiny", f"--config-dir={folder}"]


def numbers(run_dir: Path) -> list[dict]:
    """What every step measured, less its times and memory and what is told once at a start; nothing where no step has been made."""
    once = ("time/", "memory/", "perf/", "data/")
    records = metrics_of(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    return [{key: value for key, value in record.items() if not key.startswith(once)} for record in records]


def metrics_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def samples_of(run_dir: Path) -> list[list[dict]]:
    """The sampled pairs of every step."""
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted((run_dir / "samples").glob("step_*.jsonl"))]
