"""Trains a few steps in a layout and on one process, and compares them: does this cluster, laid out so, train what one device would?

torchrun --nproc-per-node 4 tools/verify_layout.py --config-name online_dpo parallel=tp2pp2

Takes a recipe and overrides as launchers/train.py does. Losses, gradient norms, log-probabilities, rewards and, of an online run, the samples are
compared step by step. --against gives the layout to compare with where one device is too small for the model; it is started by the first process
on its own node. Warmup is left out and Adam's eps raised to 1e-3. Both runs are kept in --out.
Exit code 0: the same; 1: they differ; 2: a mistake in the config.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from megapref import launch
from megapref.config import Config, load
from megapref.metrics_file import read_metrics
from megapref.parallel import one_process

ROOT = Path(__file__).resolve().parents[1]
COMPARED = ("loss", "grad_norm", "logps/chosen", "logps/rejected", "rewards/margins", "objective/scores", "num_pairs", "moe/aux_loss", "moe/load_max")
# Relative, of values that are sums over many tokens in another order. In bf16 a weight's update may round the other way.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
NOISE = 1e-6  # absolute: margins before the first update are zero but for rounding
SECONDS_FOR_RANK_0 = 10.0  # to say what is wrong: a launcher stops all processes as soon as one has ended
LAUNCHERS_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    process = launch.detect(os.environ)
    try:
        cfg = load(options.config_name, _overrides(options, "layout"), options.config_dir, process.world_size)
    except ValueError as error:
        if process.rank == 0:
            print(f"verify_layout: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(SECONDS_FOR_RANK_0)
        return 2
    if process.rank == 0:
        for name in ("layout", "other"):
            _make_room(options.out / name)
    launch.connect(process)
    from megapref.train import main as train

    train(cfg)
    launch.leave(process)
    if process.rank != 0:
        return 0
    if failed := _run_other(options):
        return failed
    return report(Console(highlight=False), options.out, cfg, options.tolerance or TOLERANCE[cfg.precision.dtype])


def report(console: Console, out: Path, cfg: Config, tolerance: float) -> int:
    """Prints the two runs side by side; 1 where they differ by more than the tolerance, or in a sample in float32."""
    pairs = list(zip(read_metrics(out / "layout" / "metrics.jsonl"), read_metrics(out / "other" / "metrics.jsonl"), strict=True))
    table = Table(title=f"{_named(cfg)} against the other layout; tolerance {tolerance:g}")
    for column in ("step", "metric", "this layout", "the other", "relative difference"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    worst = 0.0
    for mine, other in pairs:
        for name in [name for name in COMPARED if isinstance(other.get(name), float | int)]:
            distance = _distance(mine.get(name), other[name])
            worst = max(worst, distance)
            style = "red" if distance > tolerance else None
            table.add_row(str(other["step"]), name, _text(mine.get(name)), _text(other[name]), f"{distance:.1e}", style=style)
    console.print(table)
    mine, other = (_completions(out / name / "ledger") for name in ("layout", "other"))
    differing = sum(a != b for a, b in zip_longest(mine, other))
    if other:
        console.print(f"comparisons of samples: {len(other) - differing} of {len(other)} are the same token for token")
    good = worst <= tolerance and (differing == 0 or cfg.precision.dtype != "fp32")
    console.print(f"largest relative difference {worst:.1e}: {'the same' if good else 'NOT the same'}", style="green" if good else "red")
    return 0 if good else 1


def _distance(mine: float | None, other: float) -> float:
    """Relative difference, 0 within noise; infinite where one of the two is not a number."""
    if mine is None or not math.isfinite(mine) or not math.isfinite(other):
        return math.inf
    return 0.0 if abs(mine - other) <= NOISE else abs(mine - other) / max(abs(other), NOISE)


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.7g}"


def _completions(ledger: Path) -> list[dict[str, Any]]:
    """Every comparison's samples, in the order of steps and rows; none where there is no ledger."""
    files = sorted(ledger.glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file, columns=["first_ids", "second_ids"]).to_pylist()]


def _run_other(options: argparse.Namespace) -> int:
    """The layout to compare with, in processes of its own on this node; its exit code."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHERS_VARIABLES}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.against_processes}"]
    recipe = [f"--config-name={options.config_name}", *([f"--config-dir={options.config_dir}"] if options.config_dir else [])]
    command = [*start, str(ROOT / "launchers" / "train.py"), *recipe, *_overrides(options, "other")]
    return subprocess.run(command, env=environment, check=False).returncode


def _overrides(options: argparse.Namespace, name: str) -> list[str]:
    """Those of one of the two runs. The other layout's come after the user's, which are of the layout under test."""
    layout = [] if name == "layout" else [*one_process(), *options.against]
    length = [f"train.steps={options.steps}", "train.epochs=null", "optimizer.warmup_steps=0"]
    # With a small eps Adam makes whole updates of gradients that are zero but for rounding.
    return [*options.overrides, *layout, *length, "optimizer.eps=1e-3", "save.export=false", f"run.dir={options.out / name}"]


def _make_room(run_dir: Path) -> None:
    """Removes what an earlier call left there, and nothing else."""
    if run_dir.exists():
        if not (run_dir / "config.yaml").is_file():
            raise SystemExit(f"verify_layout: {run_dir} is in the way and no run; give another --out")
        shutil.rmtree(run_dir)


def _named(cfg: Config) -> str:
    chosen = [f"{name}={value}" for name, value in vars(cfg.parallel).items() if value not in (1, None, False, "none")]
    return " ".join(chosen) or "data parallel"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", required=True, metavar="RECIPE")
    parser.add_argument("--config-dir", metavar="DIR", help="more recipes and groups, your own")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="optimizer steps of both runs (default 3)")
    parser.add_argument("--against", nargs="+", default=[], metavar="KEY=VALUE", help="the layout to compare with (default: one process)")
    parser.add_argument("--against-processes", type=int, default=1, metavar="N", help="how many processes that layout has")
    parser.add_argument("--tolerance", type=float, metavar="X", help="relative difference that still is the same (fp32 1e-5, bf16 2e-2)")
    parser.add_argument("--out", type=Path, default=Path("runs/verify_layout"), metavar="DIR", help="where both runs go")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
