"""Tables of sample completions in the run directory, and the page that shows them to people.

    RUN_DIR/samples/step_000010.jsonl        pairs that were sampled in a step: prompt, first, second, scores, preference
    RUN_DIR/samples/evaluation_000010.jsonl  the policy against its opponent on validation prompts
    RUN_DIR/completions.html                 the newest of both, made of these files: it needs nothing else, and shows how answers change

The page is bounded in size and says what it leaves out. It is replaced whole, so a reader or a kill meets the old or the new one.
"""

from __future__ import annotations

import json
import math
import re
from difflib import SequenceMatcher
from functools import cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import jinja2

TABLES = 12  # newest steps on the page
ROWS = 8  # of each
EVALUATIONS = 6  # the first one and the newest
PROMPTS = 16  # validation prompts
CHARACTERS = 4000  # of a text

Row = dict[str, Any]


def write_table(run_dir: Path, step: int, rows: list[Row]) -> str:
    """Writes the rows, of training (first, second) or of an evaluation (policy, opponent), and the page anew; returns which kind they are."""
    kind = "evaluation" if "policy" in rows[0] else "step"
    (run_dir / "samples").mkdir(exist_ok=True)
    lines = [json.dumps({key: json_value(value) for key, value in row.items()}, ensure_ascii=False) + "\n" for row in rows]
    _replace(run_dir / "samples" / f"{kind}_{step:06}.jsonl", "".join(lines))
    _replace(run_dir / "completions.html", page(run_dir))
    return kind


def cut_after(run_dir: Path, step: int) -> None:
    """Removes the tables of later steps, which are done again."""
    for kind in ("step", "evaluation"):
        for number, path in _tables(run_dir, kind):
            if number > step:
                path.unlink()


def json_value(value: Any) -> Any:
    """A number, out of its tensor where it is in one, with null for what JSON cannot write; anything else unchanged."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page(run_dir: Path) -> str:
    """The page of what the folder of samples holds."""
    steps, evaluations = _tables(run_dir, "step"), _tables(run_dir, "evaluation")
    shown = [(step, _read(path)) for step, path in evaluations[:1] + evaluations[1:][-(EVALUATIONS - 1) :]]
    return _template().render(
        name=run_dir.resolve().name,
        tables=[(step, _read(path)[:ROWS]) for step, path in reversed(steps[-TABLES:])],
        prompts=_by_prompt(shown),
        steps_shown=[step for step, _ in shown],
        num_tables=len(steps),
        num_evaluations=len(evaluations),
        num_prompts=len(shown[-1][1]) if shown else 0,
        rows=ROWS,
    )


@cache
def _template() -> jinja2.Template:
    """Compiled once: that takes longer than a step of a small model."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cut": _cut, "score": _score}
    return environment.get_template("completions.html")


def _by_prompt(evaluations: list[tuple[int, list[Row]]]) -> list[dict[str, Any]]:
    """Each validation prompt with its answers, step by step, as runs of words that stayed, came or went since the answer before."""
    prompts = []
    for number, row in enumerate(evaluations[-1][1][:PROMPTS] if evaluations else []):
        answers, before = [], None
        for step, rows in evaluations:
            answer = rows[number] if number < len(rows) and rows[number]["prompt"] == row["prompt"] else None
            if answer is not None:  # a run resumed with other validation prompts has none
                text = _cut(answer["policy"])
                answers.append({**answer, "step": step, "runs": [("same", text)] if before is None else differences(before, text)})
                before = text
        prompts.append({**row, "answers": answers[::-1]})
    return prompts


def differences(before: str, after: str) -> list[tuple[str, str]]:
    """Runs of text, (same | out | in, text): those that are not `out` make `after`, those that are not `in` make `before`.

    Fewer than three words in a row that happen to be in both are no run of their own, which would be hard to read.
    """
    old, new = (re.findall(r"\s*\S+|\s+$", text) for text in (before, after))
    opcodes = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    is_same = [kind == "equal" and (j - i >= 3 or len(opcodes) == 1) for kind, i, j, _, _ in opcodes]
    runs = []
    for same, group in groupby(zip(is_same, opcodes, strict=True), key=itemgetter(0)):
        parts = [part for _, part in group]
        out, new_text = ("".join(words) for words in (old[parts[0][1] : parts[-1][2]], new[parts[0][3] : parts[-1][4]]))
        runs += [("same", new_text)] if same else [(name, text) for name, text in (("out", out), ("in", new_text)) if text]
    return runs


def _tables(run_dir: Path, kind: str) -> list[tuple[int, Path]]:
    paths = (run_dir / "samples").glob(f"{kind}_*.jsonl")
    return sorted((int(path.stem.rpartition("_")[2]), path) for path in paths)


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _replace(path: Path, text: str) -> None:
    # A lone surrogate from a byte tokenizer becomes \udcxx, which is its JSON escape.
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    partial.replace(path)


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} … ({len(text) - CHARACTERS:,} more characters)"


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3g}"
