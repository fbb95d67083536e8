"""Trains a step of an online run again, from its ledger, and compares the loss: python tools/replay.py RUN_DIR --step N

Starts at the run's newest checkpoint before the step, or at its first model, and trains every step in between on the pairs that the ledger has;
nothing is sampled or judged. Writes nothing. On CPU at the run's own layout (start it with torchrun) the numbers are the same bits; one process
alone replays a run of any layout within rounding. Exit code 0: the loss is the same, 1: it is not, 2: it cannot be replayed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megapref.batch import PairBatch
from megapref.build import Run, build
from megapref.config import Config, load
from megapref.data import ledger
from megapref.mcore import checkpoint, setup
from megapref.metrics_file import read_metrics
from megapref.parallel import one_process
from megapref.progress import observed
from megapref.train import step as train_step

COMPARED = ("loss", "grad_norm")


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        cfg, records = _read(options)
        setup.start(cfg.parallel, cfg.run.seed)
        try:
            return _replay(cfg, options, records)
        finally:
            setup.stop()
    except ValueError as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2


def _read(options: argparse.Namespace) -> tuple[Config, dict[int, dict[str, Any]]]:
    """The run's config, less what only samples and judges, and what each step measured."""
    path = options.config or max(options.run_dir.glob("config*.yaml"), key=_started, default=options.run_dir / "config.yaml")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; give the directory of a run, and with --config the config that the step was trained with")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    alone = one_process() if world_size == 1 else []
    cfg = load(path.stem, ["~data.validation", "evaluation.against=reference", *alone], str(path.parent), world_size)
    records = {record["step"]: record for record in read_metrics(options.run_dir / "metrics.jsonl")}
    if options.step not in records:
        raise ValueError(f"--step {options.step}: {options.run_dir}/metrics.jsonl has no such step; its last one is {max(records, default=0)}")
    return replace(cfg, reward={}, judge=None), records


def _started(path: Path) -> int:
    """Which start of the run the config is of; its first is config.yaml."""
    kind, _, number = path.stem.removeprefix("config.").rpartition("-")
    return int(number) if kind == "resume" else 0 if path.stem == "config" else -1


def _replay(cfg: Config, options: argparse.Namespace, records: dict[int, dict[str, Any]]) -> int:
    start = _checkpoint_before(options.run_dir, cfg, options.step)
    torch.manual_seed(cfg.run.seed)
    run = build(cfg, start)
    _say(f"from {start or cfg.model.path}")
    while run.state.step < options.step:
        metrics = _step(cfg, run, options.run_dir / "ledger", records)
        measured, recorded = ([values.get(name) for name in COMPARED] for values in (metrics, records[run.state.step]))
        shown = zip(COMPARED, recorded, measured, strict=True)
        _say(f"step {run.state.step}: " + ", ".join(f"{name} {_text(then)} in the run, {_text(now)} replayed" for name, then, now in shown))
    same = _same(measured[0], recorded[0], options.tolerance)
    _say(f"the loss of step {options.step} is {'the same' if same else 'NOT the same'} (relative tolerance {options.tolerance:g})")
    return 0 if same else 1


def _step(cfg: Config, run: Run, folder: Path, records: dict[int, dict[str, Any]]) -> dict[str, float]:
    """Trains the next step as the run did, and returns its metrics."""
    number = run.state.step + 1
    pairs = ledger.trained_pairs(setup.on_every_rank(ledger.read_step)(folder, number))
    sums = {name: (records[number][name], 1.0) for name in ("generation/length",) if name in records[number]}  # which the guard looks at
    metrics = train_step(cfg, run, PairBatch(number - 1, pairs, sums))
    observed(run.progress, cfg, metrics, run.has_reference)
    run.sync_reference()
    return metrics


def _checkpoint_before(run_dir: Path, cfg: Config, step: int) -> Path | None:
    """The newest checkpoint of an earlier step that is as it was saved; None: the run's first model. Collective."""
    for number in range(step - 1, 0, -1):
        path = checkpoint.path_of(run_dir / "checkpoints", number)
        if checkpoint.is_checkpoint(path) and checkpoint.verify(path) is None:
            return path
    return Path(cfg.run.resume) if cfg.run.resume not in (None, "auto") else None


def _same(now: float, then: float | None, tolerance: float) -> bool:
    """A loss that is not finite is null on record."""
    return math.isclose(now, then, rel_tol=tolerance) if then is not None else not math.isfinite(now)


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.9g}"


def _say(text: str) -> None:
    if setup.is_first_rank():
        print(text, flush=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="as in metrics.jsonl")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the config that the step was trained with; default: the newest in RUN_DIR")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative difference of the loss that still is the same (default 1e-5)")
    options = parser.parse_args(arguments)
    if options.step < 1:
        parser.error(f"--step {options.step} must be 1 or more")
    return options


if __name__ == "__main__":
    sys.exit(main())
