"""How numbers and samples look in the console: pure functions from values to lines and tables. A metric not there has no column."""

from __future__ import annotations

import html
import shlex
import textwrap
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

COLUMNS = (  # of the progress display: label, metric, format
    ("loss", "loss", "{:.4f}"),
    ("reward", "objective/scores", "{:+.2f}"),
    ("accuracy", "rewards/accuracies", "{:.2f}"),  # says where there are no rewards what they say elsewhere
    ("win rate", "eval/win_rate", "{:.2f}"),
    ("tokens/s", "perf/tokens_per_s", "{:,.0f}"),
)
SUMMARY = (  # of the closing table
    ("loss", "loss", "{:.4f}"),
    ("mean reward of samples", "objective/scores", "{:+.3f}"),
    ("reward margin", "rewards/margins", "{:+.3f}"),
    ("reward accuracy", "rewards/accuracies", "{:.3f}"),
    ("KL to reference", "objective/kl", "{:.3f}"),
    ("win rate (evaluation)", "eval/win_rate", "{:.3f}"),
    ("reward (evaluation)", "eval/reward", "{:+.3f}"),
    ("completion length (evaluation)", "eval/length", "{:.1f}"),
    ("KL to reference (evaluation)", "eval/kl", "{:.3f}"),
)
PLACES = (
    ("config", "config.yaml"),
    ("metrics", "metrics.jsonl"),
    ("completions", "completions.html"),
    ("samples", "samples"),
    ("ledger", "ledger"),
    ("profile", "profile"),
    ("TensorBoard", "tensorboard"),
    ("checkpoints", "checkpoints"),
    ("HF model", "hf"),
)


def format_duration(seconds: float) -> str:
    """`1:42`, or `2:05:09` from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def progress_fields(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, formatted value) of each column whose metric there is; `nan` for one that is not a finite number."""
    hidden = {"rewards/accuracies"} if "objective/scores" in metrics else set()
    return [(label, _formatted(form, metrics[key])) for label, key, form in COLUMNS if key in metrics and key not in hidden]


def evaluation_line(step: int, metrics: dict[str, Any]) -> str:
    """One line for the console that tells the evaluation made after `step` updates."""
    parts = []
    for label, key, form, beside, beside_form in (
        ("win rate", "eval/win_rate", "{:.2f}", ("eval/win_rate_low", "eval/win_rate_high"), " ({:.2f} to {:.2f})"),
        ("reward", "eval/reward", "{:+.2f}", ("eval/reward_opponent",), " (opponent {:+.2f})"),
        ("length", "eval/length", "{:.1f}", (), ""),
        ("KL", "eval/kl", "{:.2f}", (), ""),
    ):
        if key in metrics:
            addition = _formatted(beside_form, *(metrics[name] for name in beside)) if all(name in metrics for name in beside) else ""
            parts.append(f"{label} {_formatted(form, metrics[key])}{addition}")
    return f"evaluation at step {step}: " + ", ".join(parts)


def live_view(step: int, total: int, fields: list[tuple[str, str]], left: str) -> Group:
    """Two lines of a live display: how far, and the numbers."""
    bar = Table.grid(padding=(0, 1))
    done = ProgressBar(total=max(total, 1), completed=step, width=36, complete_style="cyan", finished_style="cyan")
    bar.add_row(f"step {step}/{total}", done, f"left {left}")
    numbers = Text(no_wrap=True, overflow="ellipsis")
    for label, value in fields:
        numbers.append(f"{label} ", style="dim").append(f"{value}   ", style="bold")
    return Group(bar, numbers)


def first_and_last(records: list[dict[str, Any]]) -> Table:
    """Table of the main metrics: first and last logged value, and the step of each."""
    table = _table("First and last", "metric", "first", "last", "steps")
    for label, key, form in SUMMARY:
        known = [(record["step"], record[key]) for record in records if key in record]
        if known:
            (first_step, first), (last_step, last) = known[0], known[-1]
            table.add_row(label, _formatted(form, first), _formatted(form, last), f"{first_step} to {last_step}")
    return table


def peak_memory(records: list[dict[str, Any]]) -> Table:
    """Table of the peak memory of each phase: its largest value, and the step of it. What was free before generation: the smallest."""
    table = _table("Peak memory, of the rank that needs most", "phase", "GiB", "at step")
    for key in dict.fromkeys(key for record in records for key in record if key.startswith("memory/")):
        extreme = min if key.startswith("memory/free") else max
        value, step = extreme((record[key], record["step"]) for record in records if record.get(key) is not None)
        table.add_row(key.removeprefix("memory/").removesuffix("_gib").replace("_", " "), f"{value:.2f}", str(step))
    return table


def before_and_after(rows: list[dict[str, Any]]) -> Table:
    """Table of evaluation samples: prompt, the opponent's completion, the policy's, each with its score."""
    opponent = "before (reference)" if rows and rows[0]["against"] == "reference" else "opponent"
    table = _table("Samples of the last evaluation", "prompt", opponent, "policy" if opponent == "opponent" else "after (policy)")
    for row in rows:
        sides = (Text(f"{_one_line(row[side])}\nscore {_score(row.get(f'score_{side}'))}\n") for side in ("opponent", "policy"))
        table.add_row(Text(_one_line(row["prompt"])), *sides)
    return table


def places(run_dir: Path) -> str:
    """Lines, to copy from, that say what the run directory holds and which commands show it."""
    lines = [(label, str(run_dir / name)) for label, name in PLACES if (run_dir / name).exists()]
    lines.append(("curves", f"python tools/plot_run.py {shlex.quote(str(run_dir))}"))
    if (run_dir / "hf").exists():
        lines.append(("try it", f"python tools/generate.py {shlex.quote(str(run_dir / 'hf'))}"))
    return "\n".join(f" {label:<12} {where}" for label, where in lines)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, safe for cells with bars, newlines and angle brackets; columns are the keys of the first row."""
    keys = list(rows[0])
    cells = [[html.escape(str(row.get(key, ""))).replace("|", "&#124;").replace("\n", "<br>") for key in keys] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [keys, ["---"] * len(keys), *cells])


def _formatted(form: str, *values: float | None) -> str:
    """`values` in `form`; None, which is how a non-finite number comes back from a file, reads nan."""
    return form.format(*(float("nan") if value is None else value for value in values))


def _table(title: str, *headers: str) -> Table:
    table = Table(*headers, title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for column in table.columns:
        column.justify = "right" if column.header in ("first", "last", "GiB", "at step") else "left"
    return table


def _one_line(text: str, width: int = 240) -> str:
    """`text` without line breaks and terminal escapes, at most `width` characters."""
    return textwrap.shorten("".join(letter if letter.isprintable() else " " for letter in str(text)), width, placeholder=" ...")


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
