"""How a plan looks: tables for the console, one object for JSON, rows for Markdown."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from megapref.plan.layouts import Plan, Prediction, reasons
from megapref.plan.shapes import num_parameters

MEMORY = ("weights", "gradients", "optimizer", "reference", "tables", "activations", "logits", "kv_cache")
LEFT = ("layout", "memory", "time", "runs today")  # columns of text
PREDICTION = "A prediction from formulas (docs/scaling.md); nothing was run."


def report(plan: Plan, top: int) -> Group:
    """What was asked, the chosen layout with its memory, time and reasons, the best `top` layouts, and the nearest that do not fit."""
    parts: list[Any] = [Text(headline(plan), style="bold"), Text(PREDICTION, style="dim"), Text()]
    best, asked = plan.chosen or plan.fastest, plan.of_asked
    if asked:
        parts += [layouts_table(f"Asked for: it {'fits' if asked.fits else 'does not fit'}", [asked]), _breakdown(asked)]
    if best is None:
        nearest = plan.ranked[0] if plan.ranked else None
        why = f"the smallest is {nearest.layout} with {gigabytes(nearest.memory.total)} GB a GPU" if nearest else "no layout uses all the GPUs"
        parts.append(Text(f"Nothing fits in {gigabytes(plan.usable)} GB a GPU: {why}. Use more GPUs, smaller packs, or another reference.mode."))
    else:
        today = "" if best.obstacle is None else f" (the product cannot run it today: {best.obstacle})"
        parts += [Text(f"Chosen: {best.layout}{today}", style="bold green"), *(Text(f"  - {reason}") for reason in reasons(plan, best)), Text()]
        parts += [_breakdown(best)]
    parts.append(layouts_table("Fastest that fit", plan.fitting[:top]))
    too_large = [p for p in plan.ranked if not p.fits]
    if too_large:
        parts.append(layouts_table(f"Do not fit: {len(too_large)} layouts, of which the plainest", plainest(too_large, 5)))
    return Group(*parts)


def headline(plan: Plan) -> str:
    job = plan.job
    tokens = sum(pair.prompt + pair.first + pair.second for pair in job.pairs) / len(job.pairs)
    sampled = f", {job.new_tokens} tokens sampled per completion" if job.online else ""
    dtype = f"{job.dtype} with FP8 products" if job.fp8 else job.dtype
    return (
        f"{plan.spec.family}, {num_parameters(plan.spec):,} parameters, {dtype}, on {plan.num_gpus} x {plan.gpu.name}; "
        f"{len(job.pairs)} pairs a step of {tokens:.0f} tokens on average in packs of {job.max_tokens}{sampled}; "
        f"reference {job.reference}; {plan.kernels} kernels"
    )


def plainest(predictions: list[Prediction], count: int) -> list[Prediction]:
    """The first of each tensor x pipeline size without recomputation, small sizes first."""
    firsts: dict[tuple[int, int], Prediction] = {}
    for p in sorted(predictions, key=lambda p: (p.layout.tensor * p.layout.pipeline, p.layout.context, p.layout.virtual_pipeline)):
        firsts.setdefault((p.layout.tensor, p.layout.pipeline), p)
    return list(firsts.values())[:count]


def layouts_table(title: str, predictions: list[Prediction]) -> Table:
    """One line for each layout."""
    table = _table(title, "layout", "GB", "s/step", "bubble", "comm.", "MFU", "runs today")
    for row in rows(predictions):
        table.add_row(*row.values())
    return table


def rows(predictions: list[Prediction]) -> list[dict[str, str]]:
    """The lines of that table as text."""
    return [
        {
            "layout": str(p.layout),
            "GB": gigabytes(p.memory.total),
            "s/step": short(p.time.total),
            "bubble": f"{p.time.bubble / p.time.total:.0%}",
            "comm.": f"{(p.time.tensor + p.time.context + p.time.pipeline + p.time.data) / p.time.total:.0%}",
            "MFU": f"{p.mfu:.1%}",
            "runs today": "yes" if p.obstacle is None else f"no: {p.obstacle.partition('=')[0].removeprefix('parallel.')}",
        }
        for p in predictions
    ]


def scaling_table(plans: list[Plan]) -> Group:
    """The fastest layout of each number of GPUs."""
    table = _table("The fastest layout of each number of GPUs", *scaling_rows(plans)[0])
    for row in scaling_rows(plans):
        table.add_row(*row.values())
    return Group(Text(headline(plans[0]), style="bold"), Text(PREDICTION, style="dim"), Text(), table)


def scaling_rows(plans: list[Plan]) -> list[dict[str, str]]:
    """Its lines; the speed-up counts from the first number of GPUs on which something fits, `of linear` is its share of the growth in GPUs."""
    first = next(((plan.num_gpus, plan.fastest.time.total) for plan in plans if plan.fastest), None)
    lines = []
    for plan in plans:
        best = plan.fastest
        if best is None:
            smallest = gigabytes(plan.ranked[0].memory.total) if plan.ranked else "-"
            line = dict.fromkeys(("layout", "GB", "s/step", "pairs/s", "of linear", "bubble", "comm.", "MFU", "runs today"), "-")
            lines.append({"GPUs": str(plan.num_gpus), **line, "layout": "nothing fits", "GB": smallest})
            continue
        (described,) = rows([best])
        linear = first[1] / best.time.total / (plan.num_gpus / first[0])
        speed = {"pairs/s": f"{len(plan.job.pairs) / best.time.total:.1f}", "of linear": f"{linear:.0%}"}
        before = {name: described.pop(name) for name in ("layout", "GB", "s/step")}
        lines.append({"GPUs": str(plan.num_gpus), **before, **speed, **described})
    return lines


def as_json(plan: Plan, top: int) -> dict[str, Any]:
    """The same as plain containers; bytes and seconds."""
    best = plan.chosen or plan.fastest
    return {
        "model": plan.spec.family,
        "parameters": num_parameters(plan.spec),
        "gpu": dataclasses.asdict(plan.gpu),
        "num_gpus": plan.num_gpus,
        "kernels": plan.kernels,
        "usable_bytes": plan.usable,
        "asked": plan.of_asked and prediction_json(plan.of_asked),
        "chosen": best and prediction_json(best),
        "reasons": reasons(plan, best) if best else [],
        "fitting": [prediction_json(p) for p in plan.fitting[:top]],
        "too_large": [prediction_json(p) for p in plainest([p for p in plan.ranked if not p.fits], top)],
    }


def prediction_json(p: Prediction) -> dict[str, Any]:
    return {
        "layout": p.layout.numbers(),
        "memory": dataclasses.asdict(p.memory) | {"total": p.memory.total},
        "time": dataclasses.asdict(p.time) | {"total": p.time.total},
        "packs": p.num_packs,
        "mfu": p.mfu,
        "fits": p.fits,
        "obstacle": p.obstacle,
    }


def gigabytes(value: float) -> str:
    return short(value / 1e9)


def short(value: float) -> str:
    """One digit after the point, of small numbers two that count."""
    return f"{value:.1f}" if value >= 1 or value == 0 else f"{value:.2g}"


def _breakdown(p: Prediction) -> Table:
    """Memory and time of one layout, part by part."""
    table = _table(f"Of a GPU of stage {p.memory.stage}, which needs most, and of a step", "memory", "GB", "time", "s")
    memory = [(name.replace("_", " "), gigabytes(getattr(p.memory, name))) for name in MEMORY] + [("peak", gigabytes(p.memory.total))]
    time = [(f.name, f"{getattr(p.time, f.name):.4f}") for f in dataclasses.fields(p.time)] + [("step", f"{p.time.total:.4f}")]
    for (part, size), (cause, seconds) in zip(memory + [("", "")] * (len(time) - len(memory)), time, strict=True):
        table.add_row(part, size, cause, seconds)
    return table


def _table(title: str, *headers: str) -> Table:
    table = Table(*headers, title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for column in table.columns:
        column.justify = "left" if column.header in LEFT else "right"
        column.min_width = len(column.header)
        column.no_wrap = column.header in ("layout", "runs today")
    return table
