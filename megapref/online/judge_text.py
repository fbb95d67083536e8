"""What every judge that reads and writes text shares: the question it is asked, how its answer is read, and what asking in both orders gives.

A verdict is the probability that the answer shown as A is better: 1, 0, 0.5 for a tie, or whatever number a JSON answer has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from math import isfinite
from numbers import Real
from pathlib import Path

import jinja2

from megapref.batch import Completion, Prompt

TEMPLATE = """\
Which of two answers to a prompt is better? Judge by how helpful, correct, honest and well written they are, not by their length or their order.

<prompt>
{{ prompt }}
</prompt>

<answer_A>
{{ a }}
</answer_A>

<answer_B>
{{ b }}
</answer_B>

{% if reading == "json" -%}
Reply with a JSON object and nothing else: {"preference": "A"}, {"preference": "B"}, or {"preference": "tie"} if neither is better.
{%- else -%}
Reply with one letter: A if answer A is better, B if answer B is better, C if neither is.
{%- endif %}
"""
_VERDICTS = {"A": 1.0, "B": 0.0, "C": 0.5, "TIE": 0.5}
_AT_THE_END = re.compile(r"(?:^|[\s:\[(\"'*])(A|B|C|[Tt]ie)[\s\])\"'*.]*$")
_AT_THE_START = re.compile(r"^[\s\[(\"'*]*(A|B|C|[Tt]ie)(?:[\])\"'*.:,]|\s*\n)")


def read_template(file: str | None) -> jinja2.Template:
    """The Jinja template of the question, of a file or the one above. ValueError where there is none."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False)
    try:
        return environment.from_string(TEMPLATE if file is None else Path(file).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"judge.params.template={file}: cannot be read ({error}); give a Jinja file in UTF-8") from error
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"judge.params.template={file}: line {error.lineno} is not Jinja ({error.message}); repair it") from error


def question(template: jinja2.Template, prompt: Prompt, a: Completion, b: Completion, reading: str) -> str:
    """What the judge is asked. The template sees `prompt`, `a` and `b` as text, `reading`, and `row`, the columns of the prompt's row."""
    try:
        return template.render(prompt=prompt_text(prompt), a=a.text, b=b.text, reading=reading, row=prompt.row)
    except jinja2.UndefinedError as error:
        raise ValueError(
            f"judge.params.template: {error.message}; it may use prompt, a, b, reading and row, and the columns of this row are {sorted(prompt.row)}"
        ) from error


def prompt_text(prompt: Prompt) -> str:
    """The prompt as its row has it, a conversation with the roles in front of the messages; not what the policy's chat template makes of it."""
    written = as_written(prompt)
    return written if isinstance(written, str) else "\n\n".join(f"{message['role']}: {message['content']}" for message in written)


def as_written(prompt: Prompt) -> str | list[dict[str, str]]:
    """The prompt's text or messages in its row."""
    return next((prompt.row[key] for key in ("prompt", "messages") if prompt.row.get(key) is not None), prompt.text)


def reader(reading: str, json_key: str) -> Callable[[str], float | None]:
    """The function that reads a verdict in an answer, None where it finds none. `reading`: letter | json."""
    return read_letter if reading == "letter" else lambda text: read_json(text, json_key)


def read_letter(text: str) -> float | None:
    """The verdict of an answer that ends with, or else begins with, A, B, C or tie as a word of its own."""
    match = _AT_THE_END.search(text.strip()) or _AT_THE_START.search(text.strip())
    return _VERDICTS[match[1].upper()] if match else None


def read_json(text: str, key: str) -> float | None:
    """The verdict at `key` of the last JSON object in an answer that has it: A, B, C or tie, or P(A is better) as a number."""
    decoder, found, start = json.JSONDecoder(), None, text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except ValueError:
            end = start + 1
        else:
            found = value.get(key, found)
        start = text.find("{", end)
    if isinstance(found, str):
        return _VERDICTS.get(found.strip().upper())
    is_probability = isinstance(found, Real) and not isinstance(found, bool) and isfinite(found) and 0 <= found <= 1
    return float(found) if is_probability else None


def shown(
    prompts: Sequence[Prompt], first: Sequence[Completion], second: Sequence[Completion], swap: bool
) -> list[list[tuple[Prompt, Completion, Completion] | None]]:
    """(prompt, A, B) of each pair, and with `swap` a second list with B shown as A. None where both have the same text: there is nothing to ask."""
    rows = [None if a.text == b.text else (prompt, a, b) for prompt, a, b in zip(prompts, first, second, strict=True)]
    return [rows, [row and (row[0], row[2], row[1]) for row in rows]] if swap else [rows]


def of_all_orders(as_given: Sequence[float | None], *swapped: Sequence[float | None]) -> tuple[list[float | None], dict[str, tuple[float, float]]]:
    """P(first is better) of each pair from the verdicts with the first shown as A and, where asked, as B; one missing verdict leaves none.

    The mean of the two orders is what a liking for a position cannot tip. How often both orders prefer the same completion is in
    `judge/agreement`, and how much more than 0.5 the one shown as A gets in `judge/position_bias`.
    """
    if not swapped:
        return list(as_given), {}
    both = [(p, q) for p, q in zip(as_given, *swapped, strict=True) if p is not None and q is not None]
    agreed = sum((p > 0.5) == (q < 0.5) and (p < 0.5) == (q > 0.5) for p, q in both)
    sums = {"judge/agreement": (agreed, len(both)), "judge/position_bias": (sum((p + q - 1) / 2 for p, q in both), len(both))}
    return [None if p is None or q is None else (p + 1 - q) / 2 for p, q in zip(as_given, *swapped, strict=True)], sums
