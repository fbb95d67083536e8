"""Measures what a training step and generation cost, phase by phase, on one process: a table on the console and JSON in --out.

    python tools/benchmark.py                                   # a random 6-layer model, synthetic pairs, one thread
    python tools/benchmark.py --shape 4x128 --batch 32 --threads 2
    python tools/benchmark.py --suite gpu                       # what one GPU reaches, on shapes of published models (benchmark_gpu.py)
    python tools/benchmark.py --suite train --model Qwen/Qwen2.5-0.5B --data pairs.jsonl --batch 4

`train` runs whole optimizer steps (packing, reference scoring, training) with megapref's own functions, in turns with a bare step on transformers'
weights (tools/benchmark_floor.py) on the same pairs; the ratio is the median over steps of CPU seconds, ours per theirs. `generate` samples two
completions of each prompt, as long as the sides of its pair, in turns with transformers' `generate` (tools/benchmark_generation.py). The two suites
together tell how much of an online step is sampling. Tokens are real ones: a pair's prompt counts once, padding never. On a machine that others use
compare CPU seconds, of runs or steps made in turns; the times a GPU takes are in the seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from benchmark_clock import TRAIN_PHASES, Clock, now
from benchmark_floor import FAMILIES, bare_dpo_step
from benchmark_generation import engine_round, share_of_step, transformers_round, wanted
from benchmark_inputs import describe, hardware, lengths, make_model, synthetic_pairs
from rich import box
from rich.console import Console
from rich.table import Table

from megapref import config, losses
from megapref.batch import ModelSpec, TokenPair
from megapref.convert.families import read_spec
from megapref.convert.hf import find_model, load_hf
from megapref.data.chat import load_tokenizer
from megapref.data.offline import load_pairs
from megapref.data.packing import pack, packing_stats
from megapref.mcore import device, reference, setup, step
from megapref.mcore.model import build_model
from megapref.mcore.optimizer import build_optimizer, wrap_for_training
from megapref.runlog import environment_report

BETA, LR, CLIP_GRAD = 0.1, 1e-5, 1.0


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if asks_for_gpu_suite(arguments):
        import benchmark_gpu  # with options of its own

        return benchmark_gpu.main(arguments)
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    setup.start(config.Parallel(), options.seed)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = find_model(options.model) if options.model else make_model(Path(temporary), *options.shape)
            report = measure(options, folder)
    finally:
        setup.stop()
    show(report)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"everything measured: {options.out}")
    return 0


def measure(options: argparse.Namespace, folder: Path) -> dict:
    """What was run, where, and the results of the suites."""
    spec = read_spec(folder)
    pairs = read_pairs(options, folder, spec)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    report = {"environment": environment_report(), "hardware": hardware(), "settings": settings, "model": describe(spec), "data": lengths(pairs)}

    def load() -> list[torch.nn.Module]:
        chunks = build_model(spec, config.Parallel())
        load_hf(chunks, spec, folder)
        return chunks

    if options.suite in ("train", "all"):
        report["train"] = measure_training(options, folder, spec, load, pairs)
    if options.suite in ("generate", "all"):
        report["generate"] = measure_generation(options, folder, load, pairs)
    if options.suite == "all":
        report["share_of_generation"] = share_of_step(report["train"]["megapref"], report["generate"]["megapref"])
    return report


def measure_training(options: argparse.Namespace, folder: Path, spec: ModelSpec, load: Callable, pairs: list[TokenPair]) -> dict:
    """Whole steps of ours and of the floor in turns, on the same batches."""
    clock = Clock()
    steps = {"megapref": own_step(load, options.max_tokens, clock)}
    batches = [[pairs[(i * options.batch + j) % len(pairs)] for j in range(options.batch)] for i in range(options.warmup + options.steps)]
    steps["megapref"](batches[0])
    peak = device.peak_memory_bytes()  # before the floor's two models are there
    if spec.family in FAMILIES:
        steps["floor"] = bare_dpo_step(folder, lr=LR, beta=BETA, clip_grad=CLIP_GRAD)
        steps["floor"](batches[0])
    costs: dict[str, list[np.ndarray]] = {name: [] for name in steps}
    outcomes: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for i, batch in enumerate(batches):
        if i == options.warmup:
            clock.spent.clear()
        for name in sorted(steps, reverse=bool(i % 2)):
            started = now()
            outcomes[name].append(steps[name](batch))
            if i >= options.warmup:
                costs[name].append(now() - started)
    packing = [packing_stats(pack(batch, max_tokens=options.max_tokens)) for batch in batches[options.warmup :]]
    num_pairs, num_tokens = options.batch * options.steps, sum(stats["pack/tokens"] for stats in packing)
    result = {name: rates(sum(spent), num_pairs, num_tokens) for name, spent in costs.items()}
    whole = sum(costs["megapref"])
    phases = {phase: clock.spent[phase] for phase in TRAIN_PHASES}
    phases["rest"] = whole - sum(phases.values())
    shares = {name: rates(spent, num_pairs, num_tokens) | {"share": spent[1] / whole[1]} for name, spent in phases.items()}
    result["megapref"] |= {"peak_memory_bytes": peak, "phases": shares}
    result["packing_efficiency"] = num_tokens / sum(stats["pack/tokens"] / stats["pack/efficiency"] for stats in packing)
    result["loss_and_grad_norm"] = outcomes
    if "floor" in steps:
        for mine, theirs in zip(*outcomes.values(), strict=True):
            assert np.allclose(mine, theirs, rtol=1e-3), f"megapref (loss, norm) = {mine}, floor {theirs}: they do not do the same work"
        paired = [mine[1] / theirs[1] for mine, theirs in zip(costs["megapref"], costs["floor"], strict=True)]
        low, middle, high = np.quantile(paired, (0.25, 0.5, 0.75)).tolist()
        result["ratio"] = {"median": middle, "quartiles": [low, high], "of_steps": paired}
    return result


def own_step(load: Callable, max_tokens: int, clock: Clock) -> Callable[[list[TokenPair]], tuple[float, float]]:
    """A function that makes one whole optimizer step of megapref on the pairs, on the clock, and returns loss and gradient norm."""
    policy, frozen = wrap_for_training(load()), reference.resident(load())
    state = step.TrainState(policy, build_optimizer(policy, config.Optimizer(lr=LR, clip_grad=CLIP_GRAD), config.Precision()))
    loss = partial(losses.dpo, beta=BETA)
    pack_on_clock = clock.timed("packing", pack)
    score_on_clock = clock.timed("reference scoring", reference.fill_reference)
    def run(pairs: list[TokenPair]) -> tuple[float, float]:
        with clock.inside(state):
            (packs,) = pack_on_clock(pairs, max_tokens=max_tokens)
            metrics = step.train_step(state, score_on_clock(frozen, packs), loss, LR)
        return metrics["loss"], metrics["grad_norm"]

    return run


def measure_generation(options: argparse.Namespace, folder: Path, load: Callable, pairs: list[TokenPair]) -> dict:
    """Rounds of megapref's engine and of transformers' `generate` in turns; a greedy round before shows that they do the same work."""
    requests = wanted(pairs[: options.prompts], options.new_tokens)
    makers = {"megapref": engine_round(load()[0], requests, options.slots, options.seed)}
    makers["transformers"] = transformers_round(folder, requests, options.slots)
    greedy = [make(0, 0.0) for make in makers.values()]
    same = sum(mine == theirs for mine, theirs in zip(*greedy, strict=True))
    assert same >= 0.9 * len(requests), f"{same} of {len(requests)} greedy completions are the same: they do not do the same work"
    costs: dict[str, list[np.ndarray]] = {name: [] for name in makers}
    for i in range(options.rounds):
        for name in sorted(makers, reverse=bool(i % 2)):
            started = now()
            made = makers[name](1 + i, 1.0)
            costs[name].append(now() - started)
            assert [len(ids) for ids in made] == [limit for _, limit in requests]
    num_new = sum(limit for _, limit in requests) * options.rounds
    result = {name: rates(sum(spent), len(requests) * options.rounds, num_new) for name, spent in costs.items()}
    paired = [mine[1] / theirs[1] for mine, theirs in zip(*costs.values(), strict=True)]
    ratio = {"median": float(np.median(paired)), "of_rounds": paired}
    return {"completions": len(requests), "same_greedy": same, **result, "ratio": ratio, "peak_memory_bytes": device.peak_memory_bytes()}


def rates(spent: np.ndarray, num_items: int, num_tokens: float) -> dict[str, float]:
    """Items (pairs, completions) and tokens per second and per CPU second."""
    seconds, cpu_seconds = map(float, spent)
    per = lambda number, time: number / time if time > 0 else math.inf  # noqa: E731
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "items_per_s": per(num_items, seconds),
        "tokens_per_s": per(num_tokens, seconds),
        "items_per_cpu_s": per(num_items, cpu_seconds),
        "tokens_per_cpu_s": per(num_tokens, cpu_seconds),
    }


def read_pairs(options: argparse.Namespace, folder: Path, spec: ModelSpec) -> list[TokenPair]:
    """The pairs of --data, or synthetic ones, as many as the suites need."""
    if options.data:
        return load_pairs([config.Source(options.data)], load_tokenizer(str(folder)), pack_tokens=options.max_tokens)[0]
    number = max((options.warmup + options.steps) * options.batch, options.prompts)
    return synthetic_pairs(number, spec.vocab_size, options.seed)


def show(report: dict) -> None:
    """Prints the report as tables."""
    console = Console()
    model, hardware = report["model"], report["hardware"]
    size = f"{model['num_layers']} layers, hidden {model['hidden_size']}, {model['vocab_size']} words"
    console.print(f"{model['family']}, {size}; {hardware['cpu']}, {report['settings']['threads']} thread(s), device {hardware['device']}")
    if train := report.get("train"):
        rows = {**train["megapref"]["phases"], "whole step": train["megapref"], **({"bare step": train["floor"]} if "floor" in train else {})}
        console.print(table_of("training", "pairs", rows))
        console.print(f"packing efficiency {train['packing_efficiency']:.3f}, peak memory {train['megapref']['peak_memory_bytes'] / 2**20:,.0f} MiB")
        if ratio := train.get("ratio"):
            low, high = ratio["quartiles"]
            console.print(f"CPU seconds of a step per those of the bare step: {ratio['median']:.3f} (median; quartiles {low:.3f} and {high:.3f})")
    if generate := report.get("generate"):
        console.print(table_of("generation", "completions", {name: generate[name] for name in ("megapref", "transformers")}))
        console.print(f"CPU seconds of a round per those of transformers: {generate['ratio']['median']:.3f} (median of rounds)")
        console.print(f"peak memory of the process so far {generate['peak_memory_bytes'] / 2**20:,.0f} MiB")
    if share := report.get("share_of_generation"):
        text = f"{share['items_per_s']:.0%} of the seconds and {share['items_per_cpu_s']:.0%} of the CPU seconds"
        console.print(f"sampling both completions of a pair is {text} of an online step (sampling, scoring, training; without judging)")


def table_of(title: str, items: str, rows: dict[str, dict]) -> Table:
    table = Table(title=title, box=box.SIMPLE)
    table.add_column("phase")
    for heading in ("CPU s", "share", f"{items}/s", "tokens/s", f"{items}/CPU s", "tokens/CPU s"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        share = f"{row['share']:.1%}" if "share" in row else ""
        columns = [f"{row[key]:,.2f}" for key in ("items_per_s", "tokens_per_s", "items_per_cpu_s", "tokens_per_cpu_s")]
        table.add_row(name, f"{row['cpu_seconds']:.3f}", share, *columns)
    return table


def asks_for_gpu_suite(arguments: list[str]) -> bool:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--suite")
    return parser.parse_known_args(arguments)[0].suite == "gpu"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--suite", choices=("train", "generate", "all", "gpu"), default="all", help="`--suite gpu --help` has the options of that one")
    add("--model", metavar="PATH", help="Hugging Face folder or hub name; default: a random Qwen2 of --shape")
    add("--shape", type=shape, default=(6, 256), metavar="LxH", help="layers and hidden size of the random model, default 6x256")
    add("--data", metavar="FILE", help="preference pairs, tokenized with the model's tokenizer; default: synthetic pairs of skewed lengths")
    add("--batch", type=positive, default=8, metavar="N", help="pairs per optimizer step")
    add("--steps", type=positive, default=16, metavar="N", help="measured optimizer steps")
    add("--warmup", type=positive, default=2, metavar="N", help="steps before them")
    add("--max-tokens", type=positive, default=4096, metavar="N", help="tokens of a pack")
    add("--prompts", type=positive, default=16, metavar="N", help="prompts of a round of generation, with two completions each")
    add("--new-tokens", type=positive, default=300, metavar="N", help="tokens of a completion at most")
    add("--slots", type=positive, default=32, metavar="N", help="completions decoded together")
    add("--rounds", type=positive, default=3, metavar="N", help="measured rounds of generation")
    add("--threads", type=positive, default=1, metavar="N")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("benchmark.json"), metavar="FILE")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least 1")
    return int(text)


def shape(text: str) -> tuple[int, int]:
    num_layers, _, hidden = text.partition("x")
    if not (num_layers.isdecimal() and hidden.isdecimal() and int(num_layers) and int(hidden) and int(hidden) % 64 == 0):
        raise argparse.ArgumentTypeError(f"{text} must be layers x hidden size, the latter a multiple of 64, such as 6x256")
    return int(num_layers), int(hidden)


if __name__ == "__main__":
    sys.exit(main())
