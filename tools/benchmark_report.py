"""The table of `tools/benchmark.py --suite gpu`, and its goals beside what was measured."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

COLUMNS = (  # heading, key, format
    ("ms", "seconds", lambda value: f"{1000 * value:,.1f}"),
    ("tokens/s", "tokens_per_s", lambda value: f"{value:,.0f}"),
    ("unshared/s", "unshared_tokens_per_s", lambda value: f"{value:,.0f}"),
    ("pairs/s", "pairs_per_s", lambda value: f"{value:,.2f}"),
    ("TFLOP/s", "tflops", lambda value: f"{value:,.1f}" if value >= 1 else f"{value:.4f}"),
    ("MFU", "mfu", lambda value: f"{value:.1%}"),
    ("HBM", "hbm_share", lambda value: f"{value:.1%}"),
    ("peak GiB", "peak_gib", lambda value: f"{value:.2f}"),
)
PHASES = {"packing": "pack", "reference scoring": "ref", "forward": "fwd", "head": "head", "backward": "bwd", "optimizer": "opt"}
NOT_THERE = "n/a"


def show(report: dict[str, Any]) -> None:
    """Prints the report."""
    console = Console()
    console.width = max(console.width, 180)
    hardware, settings = report["hardware"], report["settings"]
    where = hardware["gpu"] or f"{hardware['cpu']}, {settings['threads']} thread(s); seconds are CPU seconds"
    console.print(f"{where}; {settings['pairs']} pairs a step, packs of {settings['max_tokens']} tokens")
    console.print(table_of(report["rows"]))
    console.print(goal_table(report["goals"]))


def table_of(rows: list[dict[str, Any]]) -> Table:
    """A line for each row; what is not known there reads n/a. Of rows that were not measured it says why."""
    table = Table(box=box.SIMPLE, title="a step of training; a token of every completion")
    for heading in ("shape", "precision", "step"):
        table.add_column(heading, no_wrap=True)
    for heading, *_ in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("share of phases, or why not")
    alike = groupby(rows, key=itemgetter("shape", "layers", "precision", "status"))
    for (shape, layers, precision, status), some in [(key, list(group)) for key, group in alike]:
        name = f"{shape} ({layers} layers)"
        if status != "ok":  # those that lie together for the same reason in one line
            table.add_row(name, precision, some[0]["step"] if len(some) == 1 else f"{len(some)} rows", *[""] * len(COLUMNS), status)
            continue
        for row in some:
            cells = [NOT_THERE if row.get(key) is None else form(row[key]) for _, key, form in COLUMNS]
            table.add_row(name, precision, row["step"], *cells, shares(row.get("phases", {})))
    return table


def shares(phases: dict[str, float]) -> str:
    """Such as `fwd 30%`, of the sum of the phases."""
    whole = sum(phases.values())
    return " ".join(f"{PHASES[phase]} {spent / whole:.0%}" for phase, spent in phases.items())


def goal_table(goals: list[dict[str, Any]]) -> Table:
    """Every goal, what was measured, and whether that reaches it."""
    table = Table(box=box.SIMPLE, title="goals, which are set for one GPU")
    for heading in ("goal", "of", "at least", "measured", "reached"):
        table.add_column(heading, justify="right" if heading in ("at least", "measured") else "left")
    for goal in goals:
        measured = goal["measured"]
        reached = NOT_THERE if measured is None else "yes" if measured >= goal["target"] else "no"
        table.add_row(goal["goal"], goal["of"], f"{goal['target']:.2f}", NOT_THERE if measured is None else f"{measured:.3f}", reached)
    return table
