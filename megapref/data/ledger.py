"""The ledger of an online run: every comparison of two samples with its verdict, one Parquet file a step, and back to pairs from there.

    RUN_DIR/ledger/step_000001.parquet   step as in metrics.jsonl; a row for each comparison, in the order in which pairs are trained
    RUN_DIR/ledger/unused/               files of steps that a resumed run did again

A file has its name only when it is whole. Rows are the same at every layout. Read with the tokenizer that made them they give the token ids that
were judged; with another one their texts are tokenised anew.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from megapref.batch import Contest, TokenPair
from megapref.data.chat import RenderedRow, render
from megapref.data.formats import prompt_of
from megapref.data.rows import BadRow, Location, OnBad

_IDS = pa.list_(pa.int32())
_SIDE = {"text": pa.string(), "ids": _IDS, "finished": pa.bool_(), "score": pa.float64(), "side": pa.int32(), "model": pa.string()}
SCHEMA = pa.schema(
    {
        "step": pa.int64(),  # as in metrics.jsonl
        "weight_version": pa.int64(),  # steps that the weights had been trained for when they sampled
        "seed": pa.int64(),  # run.seed; with step, prompt_index and side it gives the noise of a sample
        "number": pa.int32(),  # of the comparison in its step
        "prompt_index": pa.int64(),  # of the prompt in data.train
        "tokenizer": pa.string(),  # digest of the vocabulary
        "prompt": pa.string(),  # text of a standard prompt
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),  # or of a conversation
        "prompt_text": pa.string(),  # what was tokenised
        "prompt_ids": _IDS,
        **{f"{side}_{name}": kind for side in ("first", "second") for name, kind in _SIDE.items()},
        "preference": pa.float64(),  # P(first is better); null: no verdict
        "judge": pa.string(),  # its raw answer
        "trained": pa.bool_(),
        "second_trained": pa.bool_(),  # or it only judged the first
    }
)


class Undecided(BadRow):
    """A comparison without a verdict: it gives no pair, and is counted."""

    remedy = "it is left out"


def write_step(folder: Path, contests: Sequence[Contest], pairs: Sequence[TokenPair], **of_step: Any) -> None:
    """Writes the file of a step: its contests, whose trained comparisons are the `pairs`. `of_step`: step, weight_version, seed, tokenizer.

    OSError where it cannot be written; a file of that step is replaced.
    """
    trained, rows = iter(pairs), []
    for contest, each in [(own, each) for own in contests for each in own.comparisons]:
        second_trained = bool(next(trained).second_ids) if each.trained else False
        sides = _side(contest, each.first, "first") | _side(contest, each.second, "second")
        said = None if each.text is None else each.text.encode(errors="replace").decode()
        verdict = {"preference": each.preference, "judge": said, "trained": each.trained, "second_trained": second_trained}
        rows.append({**of_step, "number": len(rows), **_prompt(contest), **sides, **verdict})
    folder.mkdir(exist_ok=True)
    partial = folder / f".{_name(of_step['step'])}.partial"
    with partial.open("wb") as file:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / _name(of_step["step"]))


def _prompt(contest: Contest) -> dict[str, Any]:
    prompt = contest.prompt
    value = prompt_of(prompt.row, Location("data.train", prompt.index + 1))
    source = {"prompt": value, "messages": None} if isinstance(value, str) else {"prompt": None, "messages": value}
    return {"prompt_index": prompt.index, **source, "prompt_text": prompt.text, "prompt_ids": prompt.ids}


def _side(contest: Contest, number: int, name: str) -> dict[str, Any]:
    sample = contest.candidates[number]
    values = {"text": sample.text, "ids": sample.ids, "finished": sample.finished, "score": contest.scores[number]}
    return {f"{name}_{key}": value for key, value in {**values, "side": number, "model": contest.models[number]}.items()}


def read_step(folder: Path, step: int) -> list[dict[str, Any]]:
    """The rows of a step, in order. ValueError where there is no file of it, or it cannot be read."""
    path = folder / _name(step)
    try:
        return pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path}: the ledger of step {step} cannot be read ({error}); runs write it where log.ledger=true") from error


def set_aside_after(folder: Path, step: int) -> int:
    """Moves the files of later steps, which are done again, into `unused/`, and removes what a kill left half written; how many were moved."""
    for killed in folder.glob(".*.partial"):
        killed.unlink()
    later = [path for path in sorted(folder.glob("step_*.parquet")) if int(path.stem.removeprefix("step_")) > step]
    for path in later:
        (folder / "unused").mkdir(exist_ok=True)
        names = (folder / "unused" / f"{path.stem}{f'_{i}' if i else ''}.parquet" for i in itertools.count())
        path.rename(next(name for name in names if not name.exists()))
    return len(later)


def is_row(row: dict[str, Any]) -> bool:
    """Whether a row is one of a ledger."""
    return {"first_ids", "second_ids", "prompt_ids", "preference", "tokenizer"} <= row.keys()


def trained_pairs(rows: Sequence[dict[str, Any]]) -> list[TokenPair]:
    """The pairs that a step was trained on, from its rows."""
    return [
        TokenPair(row["prompt_ids"], row["first_ids"], row["second_ids"] if row["second_trained"] else (), row["preference"])
        for row in rows
        if row["trained"]
    ]


def rendered_pair(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], location: Location, pairing: str, on_undecided: OnBad
) -> list[RenderedRow]:
    """The pair of a row as it was judged, with its preference; nothing for one without a verdict, or with `pairing` best_worst one not trained on."""
    if row["preference"] is None:
        on_undecided(Undecided(location, "preference: the judge gave none"))
        return []
    if pairing == "best_worst" and not row["trained"]:
        return []
    prompt = row["prompt_text"] if row["messages"] is None else row["messages"]
    texts = [row["first_text"], row["second_text"]]
    ended = (row["first_finished"], row["second_finished"])
    if row["tokenizer"] == vocabulary_digest(tokenizer):
        ids = (row["prompt_ids"], [row["first_ids"], row["second_ids"]])
        return [RenderedRow(row["prompt_text"], tuple(texts), (None, None), False, location, {}, row["preference"], ended, ids)]
    sides = texts if row["messages"] is None else [[{"role": "assistant", "content": text}] for text in texts]
    return [replace(render(tokenizer, prompt, sides, location, {}), preference=row["preference"], ended=ended)]


def rendered_completions(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], location: Location, pairing: str, on_undecided: OnBad
) -> list[RenderedRow]:
    """Both sides of a row by themselves, with whether they are desirable; nothing for a tie."""
    if row["preference"] == 0.5:
        on_undecided(Undecided(location, "preference: a tie makes neither completion desirable"))
        return []
    found = []
    for pair in rendered_pair(tokenizer, row, location, pairing, on_undecided):
        for side, good in enumerate((row["preference"] > 0.5, row["preference"] < 0.5)):
            ids = pair.ids and (pair.ids[0], [pair.ids[1][side]])
            own = {"completions": (pair.completions[side],), "trained": (None,), "ended": (pair.ended[side],), "ids": ids}
            found.append(replace(pair, **own, columns={"desirable": float(good)}, preference=1.0))
    return found


@lru_cache(maxsize=4)
def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Tells vocabularies apart: under the same digest token ids mean the same."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def _name(step: int) -> str:
    return f"step_{step:06d}.parquet"
