"""`tools/benchmark.py --suite gpu`: what one GPU reaches, against its data sheet, on shapes of published models with random weights.

    python tools/benchmark.py --suite gpu                                              # all shapes, bf16 and FP8, within --budget-seconds
    python tools/benchmark.py --suite gpu --shapes qwen3-4b --precisions bf16 --modes sft dpo-cached
    python tools/benchmark.py --suite gpu --shapes llama-3.1-8b --layers 8             # a shape whose optimizer does not fit, cut
    python tools/benchmark.py --suite gpu --shapes tiny                                # without a GPU: does it run?

One table, and JSON in --out. Rows: training steps of `sft`, and of DPO with a `live` and a `cached` reference, with pairs `shared` (packed, a pair's
prompt once), `packed` (each completion with its prompt) and `padded` (to the step's longest sequence, as many to a pack as fit); and decoding at
several batch sizes. A row that cannot be measured says why. Formulas and goals: docs/benchmarks/gpu_suite.md. Without a GPU costs are CPU seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_cases import LAYOUTS, Case, training_cases
from benchmark_clock import TRAIN_PHASES, Clock, now
from benchmark_figures import decode_bytes, decode_figures, goals, step_figures
from benchmark_inputs import hardware, synthetic_pairs
from benchmark_report import show
from benchmark_shapes import SHAPES, randomise, spec_of

from megapref import config
from megapref.batch import ModelSpec
from megapref.compose import groups, search_path
from megapref.data.packing import pack
from megapref.inference.sampling import Sampling, keys, sample, uniforms
from megapref.mcore import capabilities, device, reference, setup, step
from megapref.mcore.generation import Engine
from megapref.mcore.kernels import choose, machine, no_decoding_attention
from megapref.mcore.model import build_model
from megapref.mcore.optimizer import build_optimizer, wrap_for_training
from megapref.plan.hardware import Gpu, gpu_named
from megapref.plan.shapes import Layout
from megapref.plan.timing import cache_per_token
from megapref.plan.workload import Job
from megapref.runlog import environment_report

GIB = 2**30
NO_TOKEN = -1  # as the stop token: the lengths are given
MODES = ("sft", "dpo-live", "dpo-cached", "decode")

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What `--precisions` names options of."""

    precision: config.Precision = field(default_factory=config.Precision)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    setup.start(config.Parallel(), options.seed)
    try:
        report = measure(options)
    finally:
        setup.stop()
    show(report)
    print(f"everything measured: {options.out}")
    return int(any(row["status"].startswith("failed") for row in report["rows"]))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rows, written to --out after each model, so that what ends early leaves what it has."""
    deadline = time.monotonic() + options.budget_seconds
    gpu = gpu_named(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = hardware() | {"gpu": name} | capabilities.device_report()
    report = {"environment": environment_report(), "hardware": found, "settings": settings, "kernels": {}, "rows": []}
    for shape in options.shapes:
        for precision in options.precisions:
            report["rows"] += measure_model(options, shape, precision, gpu, deadline, report["kernels"])
            report["goals"] = goals(report["rows"], options.max_tokens)
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def measure_model(
    options: argparse.Namespace, shape: str, precision_name: str, gpu: Gpu | None, deadline: float, kernels: dict[str, Any]
) -> list[Row]:
    """The rows of one shape in one precision; what computes it goes into `kernels`."""
    spec = spec_of(shape, options.layers)
    cases = training_cases(spec, synthetic_pairs(options.pairs, spec.vocab_size, options.seed), options.modes, options.layouts)
    batches = options.batches if "decode" in options.modes else []
    named = {"shape": shape, "layers": spec.transformer["num_layers"], "precision": precision_name, "status": "ok"}
    rows = {case.name: named | {"step": case.name} for case in cases}
    decoding = {batch: named | {"step": f"decode {batch}"} for batch in batches}
    everything = [*rows.values(), *decoding.values()]
    found: list[config.Precision] = []

    def prepare() -> None:
        precision = config.load_settings(Settings, {}, [f"precision={precision_name}"]).precision
        choice = choose(spec.transformer, 1, precision, config.Kernels(), machine())
        kernels[f"{shape} {precision_name}"] = capabilities.kernel_report(choice)
        found.append(precision)

    attempt(everything, deadline, prepare)
    for precision in found:
        peak = gpu.flops.get(peak_name(precision)) if gpu else None
        if cases:
            attempt(list(rows.values()), deadline, partial(measure_training, options, spec, precision, cases, rows, peak, deadline))
        if decoding:
            attempt(list(decoding.values()), deadline, partial(measure_decoding, options, spec, precision, decoding, gpu, deadline))
    return everything


def attempt(rows: list[Row], deadline: float, function: Callable[[], Any]) -> None:
    """Runs the function, unless the time is over. What it raises becomes the status of those of its rows that are still good."""
    status = "not run: --budget-seconds are over" if time.monotonic() > deadline else None
    if status is None:
        try:
            function()
        except torch.OutOfMemoryError:
            status = "out of memory"
        except ValueError as error:  # what this machine cannot do
            status = str(error).partition("\n")[0]
        except Exception as error:  # one configuration that fails must not take the others' figures with it; the exit code tells
            traceback.print_exc()
            status = f"failed: {type(error).__name__}: {error}".partition("\n")[0]
    gc.collect()  # what the error's frames held
    torch.cuda.empty_cache()
    for row in rows if status else ():
        row["status"] = status if row["status"] == "ok" else row["status"]


def measure_training(
    options: argparse.Namespace,
    spec: ModelSpec,
    precision: config.Precision,
    cases: list[Case],
    rows: dict[str, Row],
    peak_flops: float | None,
    deadline: float,
) -> None:
    """Fills the rows of the cases: memory and phases of each by itself, then whole steps of all in turns."""
    policy = wrap_for_training(random_model(spec, precision), precision)
    state = step.TrainState(policy, build_optimizer(policy, config.Optimizer(lr=1e-6), precision))
    frozen: list[reference.Reference] = []  # made when it is needed, so that the others' memory is without it

    def run(case: Case, clock: Clock | None = None) -> None:
        timed = clock.timed if clock else lambda phase, function: function
        layout = {"max_tokens": options.max_tokens, "share_prompt": case.share_prompt, "pad_multiple": precision.pad_multiple}
        (packs,) = timed("packing", pack)(case.pairs, **layout)
        if case.live:
            packs = timed("reference scoring", reference.fill_reference)(frozen[0], packs)
        step.train_step(state, packs, case.loss, 1e-6)

    def look(case: Case) -> None:
        if case.live and not frozen:
            frozen.append(reference.resident(random_model(spec, precision)))
        for _ in range(options.warmup):
            run(case)
        clock = Clock()
        device.forget_peak_memory()
        with clock.inside(state):
            run(case, clock)
        rows[case.name]["peak_gib"] = device.peak_memory_bytes() / GIB
        rows[case.name]["phases"] = {phase: float(cost(clock.spent[phase])) for phase in TRAIN_PHASES if phase in clock.spent}

    costs: dict[str, list[float]] = {case.name: [] for case in cases}

    def take(case: Case) -> None:
        started = now()
        run(case)
        costs[case.name].append(float(cost(now() - started)))

    for case in cases:
        attempt([rows[case.name]], deadline, partial(look, case))
    for i in range(options.steps):
        for case in cases[:: -1 if i % 2 else 1]:
            if rows[case.name]["status"] == "ok":
                attempt([rows[case.name]], deadline, partial(take, case))
    for case in cases:
        if rows[case.name]["status"] == "ok":
            rows[case.name] |= {"tokens": case.work.tokens} | step_figures(case.work, float(np.median(costs[case.name])), peak_flops)


def measure_decoding(
    options: argparse.Namespace, spec: ModelSpec, precision: config.Precision, rows: dict[int, Row], gpu: Gpu | None, deadline: float
) -> None:
    """Fills the rows of the batches: from one token of every completion to the next, while all are decoded together."""
    if missing := no_decoding_attention(machine()):
        raise ValueError(missing)
    (model,) = random_model(spec, precision)

    def look(batch: int) -> None:
        generator = np.random.default_rng(options.seed)
        prompts = generator.integers(3, spec.vocab_size, (batch, options.prompt_tokens)).tolist()
        noise = keys(options.seed, 0, np.arange(batch))
        longest = options.prompt_tokens + options.new_tokens
        bytes_per_token = cache_per_token(spec, Job((), dtype=precision.dtype), Layout())
        room = 1.25 * (batch + 1) * (-(-longest // 256) * 256) * bytes_per_token  # whole blocks of the paged cache
        # As many prompts as possible are computed at once: the first completions must not have ended before the last has begun.
        at_once = min(spec.max_positions, max(longest, batch * options.prompt_tokens))
        engine = Engine(model, config.Generation(max_requests=batch, kv_cache_gb=room / GIB), at_once)
        marks: list[tuple[float, int]] = []  # when all completions got a token, and how many tokens they had together

        def draw(logits: torch.Tensor, asked: np.ndarray, positions: np.ndarray) -> torch.Tensor:
            if len(asked) == batch:
                marks.append((time.perf_counter() if torch.cuda.is_available() else time.process_time(), int(positions.sum())))
            return sample(logits, uniforms(noise[asked], positions), Sampling(1.0))

        engine.generate(prompts, draw, [2] * batch, NO_TOKEN)
        marks.clear()
        device.forget_peak_memory()
        engine.generate(prompts, draw, [options.new_tokens] * batch, NO_TOKEN)
        if len(marks) < 3:
            raise ValueError(f"the {batch} completions were decoded together for {len(marks)} tokens only; raise --new-tokens")
        rows[batch]["peak_gib"] = device.peak_memory_bytes() / GIB
        times, tokens = map(np.array, zip(*marks, strict=True))
        step_bytes = decode_bytes(spec, model, precision.dtype, float(tokens[1:].mean()))
        rows[batch] |= decode_figures(batch, step_bytes, float(np.median(np.diff(times))), gpu)

    for batch, row in rows.items():
        attempt([row], deadline, partial(look, batch))


def random_model(spec: ModelSpec, precision: config.Precision) -> list[torch.nn.Module]:
    chunks = build_model(spec, config.Parallel(), precision)
    randomise(chunks)
    return chunks


def peak_name(precision: config.Precision) -> str:
    """The rate of a data sheet that a precision is held against: that of FP8 products where layers have them, though the head has not."""
    return "fp8" if precision.fp8 else precision.dtype


def cost(spent: np.ndarray) -> float:
    """Seconds on a GPU, CPU seconds without one: others may use the CPU too."""
    return spent[0] if torch.cuda.is_available() else spent[1]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    has_gpu = torch.cuda.is_available()
    known = groups(search_path(), Settings)["precision"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--suite", choices=("gpu",), default="gpu")
    shapes = [name for name in SHAPES if name not in ("small", "tiny")] if has_gpu else ["tiny"]
    add("--shapes", nargs="+", choices=SHAPES, default=shapes, help="default: all but small and tiny; without a GPU tiny")
    precisions = ["bf16", "fp8_delayed"] if has_gpu else ["fp32"]
    add("--precisions", nargs="+", choices=known, default=precisions, help="options of the config group; default: %(default)s")
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    add("--layers", type=int, metavar="N", help="only so many layers of every shape")
    add("--pairs", type=int, default=32 if has_gpu else 4, metavar="N", help="of a step; synthetic, of skewed lengths, 340 tokens on average")
    add("--max-tokens", type=int, default=4096, metavar="N", help="of a pack")
    add("--warmup", type=int, default=2 if has_gpu else 1, metavar="N", help="steps of every row before it is measured")
    add("--steps", type=int, default=3, metavar="N", help="measured steps of every row; their median counts")
    add("--batches", nargs="+", type=int, default=[1, 32, 256] if has_gpu else [1, 8], metavar="N", help="completions decoded together")
    add("--prompt-tokens", type=int, default=512 if has_gpu else 32, metavar="N", help="of a prompt before decoding")
    add("--new-tokens", type=int, default=128 if has_gpu else 16, metavar="N", help="of a completion when decoding; the median counts")
    add("--budget-seconds", type=float, default=480.0, metavar="S", help="after which no further row is begun")
    add("--threads", type=int, default=1, metavar="N")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("benchmark_gpu.json"), metavar="FILE")
    return parser.parse_args(arguments)
