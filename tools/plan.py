"""Predicts memory and step time of a model on a cluster and ranks layouts. Nothing is run, no weights are read.

    python tools/plan.py Qwen/Qwen2.5-0.5B-Instruct --gpus 8 --gpu h100                   # a folder, a config.json or a hub name
    python tools/plan.py models/mine --gpus 64 --gpu h200 --data pairs.jsonl              # lengths of its rows
    python tools/plan.py docs/scaling/llama3_405b.json --gpus 1024 --kernels fused --prompt 1024 --completion 1024
    python tools/plan.py models/mine --gpus 8,16,32,64                                    # the fastest layout of each number of GPUs
    python tools/plan.py models/mine --gpus 16 --layout tensor=8 pipeline=2 sequence=true

A histogram of lengths is a JSON file of entries [prompt, first, second, weight]. `launchers/train.py --plan=64xh100` plans a recipe's run.
The formulas and how far they were checked: docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from megapref.batch import ModelSpec
from megapref.config import Source
from megapref.data.chat import load_tokenizer
from megapref.data.offline import load_pairs
from megapref.display import markdown_table
from megapref.plan import tables
from megapref.plan.hardware import GPUS
from megapref.plan.layouts import Plan, make_plan
from megapref.plan.shapes import Layout
from megapref.plan.workload import Job, PairLengths, spread
from megapref.planning import histogram_of, lengths_of, obstacles, read_model

ONLINE = ("online_dpo", "xpo")


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        spec = read_model(options.model)
        job = job_of(options, spec)
        plans = [_plan(options, spec, job, int(number)) for number in options.gpus.split(",")]
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([tables.as_json(plan, options.top) for plan in plans], indent=2))
    elif options.markdown:
        print(f"{tables.headline(plans[0])}\n")
        lines = tables.scaling_rows(plans) if len(plans) > 1 else tables.rows(plans[0].fitting[: options.top])
        print(markdown_table(lines) if lines else "Nothing fits.")
    elif len(plans) > 1:
        Console(highlight=False).print(tables.scaling_table(plans))
    else:
        Console(highlight=False).print(tables.report(plans[0], options.top))
    return 0


def job_of(options: argparse.Namespace, spec: ModelSpec) -> Job:
    """The step that the options describe. Errors: ValueError for a file that is not what it should be."""
    is_online = options.method in ONLINE
    second = 0 if options.method == "sft" else options.completion
    histogram = [(PairLengths(options.prompt, options.completion, second), 1.0)]
    if options.lengths:
        histogram = read_histogram(Path(options.lengths))
    if options.data:
        rows, _ = load_pairs([Source(options.data)], load_tokenizer(options.model, None), on_bad_row="skip")
        histogram = histogram_of([(lengths_of(row, 0), 1.0) for row in rows])
    return Job(
        pairs=spread(histogram, options.batch),
        max_tokens=options.max_tokens,
        share_prompt=not options.repeat_prompt,
        dtype="fp32" if options.dtype == "fp32" else "bf16",
        fp8=options.dtype == "fp8",
        reference="none" if options.method == "sft" else options.reference,
        prompts=options.batch if is_online else 0,
        new_tokens=max(max(lengths.first, lengths.second) for lengths, _ in histogram) if is_online else 0,
        samples_reference=options.method == "xpo",
        max_requests=options.max_requests,
        kv_cache=options.kv_cache_gb * 2**30,
    )


def read_histogram(file: Path) -> list[tuple[PairLengths, float]]:
    """Entries [prompt, first, second, weight] of a JSON file."""
    rule = "a histogram of lengths is a JSON list of [prompt, first, second, weight], numbers of 1 or more, second may be 0"
    try:
        entries = json.loads(file.read_text())
        rows = [(PairLengths(int(p), int(a), int(b)), float(weight)) for p, a, b, weight in entries]
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {rule} ({error})") from error
    for lengths, _ in rows:
        if lengths.prompt < 1 or lengths.first < 1 or lengths.second < 0:
            raise ValueError(f"{file}: {rule}; found {lengths}")
    return histogram_of(rows)


def parse_layout(words: list[str], num_gpus: int) -> Layout:
    """`tensor=8 pipeline=2 sequence=true` as a layout of so many GPUs, the rest of them data parallel."""
    values: dict[str, int | bool | str] = {}
    for word in words:
        name, _, value = word.partition("=")
        kinds = {"tensor": int, "pipeline": int, "virtual_pipeline": int, "context": int, "sequence": lambda text: text == "true", "recompute": str}
        if name not in kinds or (name == "recompute" and value not in ("none", "selective", "full")):
            raise ValueError(f"--layout {word}: not NAME=VALUE with {', '.join(kinds)} (none, selective, full)")
        values[name] = kinds[name](value)
    ranks = Layout(**values).num_gpus
    if num_gpus % ranks:
        raise ValueError(f"--layout {' '.join(words)}: its {ranks} ranks do not divide {num_gpus} GPUs")
    return Layout(**values, data=num_gpus // ranks)


def _plan(options: argparse.Namespace, spec: ModelSpec, job: Job, num_gpus: int) -> Plan:
    asked = parse_layout(options.layout, num_gpus) if options.layout else None
    kernels = options.kernels or ("torch" if options.dtype == "fp32" else "fused")
    return make_plan(spec, job, GPUS[options.gpu], num_gpus, kernels, obstacles(spec), asked)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder, config.json or hub name")
    parser.add_argument("--gpus", required=True, metavar="N[,N...]", help="how many; several numbers give a table of the fastest layout of each")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--method", choices=("dpo", "sft", *ONLINE), default="dpo", help="the shape of a step; losses do not matter")
    parser.add_argument("--batch", type=int, default=256, metavar="PAIRS", help="pairs, or prompts, of an optimizer step")
    parser.add_argument("--prompt", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--completion", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--lengths", metavar="FILE", help="a histogram of lengths instead")
    parser.add_argument("--data", metavar="FILE", help="pairs whose lengths are taken, with the tokenizer of the model's folder")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of a pack")
    parser.add_argument("--repeat-prompt", action="store_true", help="pack.share_prompt=false")
    parser.add_argument("--reference", choices=("resident", "swapped", "cached", "free", "none"), default="resident")
    parser.add_argument("--dtype", choices=("bf16", "fp8", "fp32"), default="bf16", help="fp8: a bf16 model whose layers' products are in FP8")
    parser.add_argument("--max-requests", type=int, default=256, help="completions decoded together")
    parser.add_argument("--kv-cache-gb", type=float, default=8.0, help="GiB per rank, of methods that sample")
    parser.add_argument("--kernels", choices=("torch", "fused"), help="fused: Transformer Engine's, the default but for fp32")
    parser.add_argument("--layout", nargs="+", metavar="NAME=VALUE", help="a layout to look at beside the ranking")
    parser.add_argument("--top", type=int, default=8, metavar="K", help="layouts listed")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)
    for name in ("batch", "prompt", "completion", "max_tokens", "max_requests", "top"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}={getattr(options, name)} must be at least 1")
    if not all(number.isdecimal() and int(number) for number in options.gpus.split(",")):
        parser.error(f"--gpus={options.gpus}: not a number of GPUs, or several with commas between them")
    return options


if __name__ == "__main__":
    sys.exit(main())
