"""Brings every format of a row to one of three shapes: a prompt, `PreferenceRow`s, or an `UnpairedRow`. What does not fit is a `BadRow`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from megapref.data.conversations import Text, completion_text, conversation, get, prompt_text, shared_length, show_keys
from megapref.data.rows import BadRow, Location, OnBad, raise_bad_row, show

HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
LABELS = {True: True, False: False, "true": True, "false": False, "desirable": True, "undesirable": False}


class Tie(BadRow):
    """Two completions of which a row prefers neither."""

    remedy = "repair the row, or set data.ties=skip"


@dataclass(frozen=True)
class PreferenceRow:
    """A prompt with its chosen and rejected completion, all strings or all conversations; without `rejected` it is a demonstration.

    `extras` has score_first and score_second where the row scores chosen and rejected.
    """

    prompt: Text
    chosen: Text
    rejected: Text | None
    location: Location
    extras: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class UnpairedRow:
    """A prompt with one completion that is desirable or not, both strings or both conversations."""

    prompt: Text
    completion: Text
    desirable: bool
    location: Location


def prompt_of(row: dict[str, Any], location: Location) -> Text:
    """The prompt of a prompt-only row, in `prompt` or `messages`: a string or a conversation that awaits an answer.

    Other columns are left to judges and rewards.
    """
    key = "messages" if _has(row, "messages") and not _has(row, "prompt") else "prompt"
    return prompt_text(get(row, key, location), key, location)


def unpaired_of(row: dict[str, Any], location: Location) -> UnpairedRow:
    """The completion of a row with `prompt`, `completion` and `label`: true or false, 1 or 0, desirable or undesirable."""
    label = get(row, "label", location)
    label = label.lower() if isinstance(label, str) else label
    if not isinstance(label, str | int) or label not in LABELS:
        raise BadRow(location, f"label: expected true or false, 1 or 0, desirable or undesirable, got {show(row['label'])}")
    prompt, completion = _demonstration(row, location)
    return UnpairedRow(prompt, completion, LABELS[label], location)


def preferences_of(
    row: dict[str, Any], location: Location, *, pairing: str = "best_worst", on_tie: Callable[[Tie], None] = raise_bad_row
) -> list[PreferenceRow]:
    """The pairs of a row in any of the preference formats, or its demonstration; pairs that are tied go to `on_tie`.

    Formats: prompt/chosen/rejected or prompt/chosen_response/rejected_response, conversations that hold the prompt themselves (UltraFeedback,
    Tulu 3), transcripts (HH), context/response1/response2/overall_preference (HelpSteer3), context/completions with ranks, of which
    lower is better (`pairing`: best_worst is one pair, all is every two). Demonstrations: prompt/completion, messages.
    """
    if _has(row, "completions"):
        return _ranked(row, location, pairing, on_tie)
    if _has(row, "response1", "response2"):
        return _helpsteer(row, location, on_tie)
    for keys in (("chosen", "rejected"), ("chosen_response", "rejected_response")):
        if _has(row, *keys):
            return [_chosen_rejected(row, keys, location)]
    if _has(row, "label"):
        raise BadRow(location, "label: expected a pair or a demonstration, got an unpaired row; leave label out to train on its completion")
    if _has(row, "completion", "messages"):
        prompt, completion = _demonstration(row, location)
        return [PreferenceRow(prompt, completion, None, location)]
    expected = "prompt with chosen and rejected, context with completions or responses, prompt with completion, or messages"
    raise BadRow(location, f"has the keys {show_keys(row)}, expected {expected}")


def _has(row: dict[str, Any], *keys: str) -> bool:
    return any(row.get(key) is not None for key in keys)


def _chosen_rejected(row: dict[str, Any], keys: tuple[str, str], location: Location) -> PreferenceRow:
    sides = [get(row, key, location) for key in keys]
    if row.get("prompt") is None or (isinstance(row["prompt"], str) and _begin_alike(sides)):
        prompt, sides = _split_prompt(*sides, keys, location)
    else:
        prompt = row["prompt"]
    prompt, (chosen, rejected) = _pair_up(prompt, sides, "prompt", keys, location)
    return _distinct(PreferenceRow(prompt, chosen, rejected, location, _scores(row, location)), keys)


def _scores(row: dict[str, Any], location: Location) -> dict[str, float]:
    if not _has(row, "score_chosen", "score_rejected"):
        return {}
    scores = [get(row, key, location) for key in ("score_chosen", "score_rejected")]
    for key, score in zip(("score_chosen", "score_rejected"), scores, strict=True):
        if not isinstance(score, int | float) or isinstance(score, bool) or not math.isfinite(score):
            raise BadRow(location, f"{key}: expected a finite number, got {show(score)}")
    return {"score_first": float(scores[0]), "score_second": float(scores[1])}


def _helpsteer(row: dict[str, Any], location: Location, on_tie: OnBad) -> list[PreferenceRow]:
    preference = get(row, "overall_preference", location)
    if not isinstance(preference, int) or isinstance(preference, bool) or not -3 <= preference <= 3:
        raise BadRow(location, f"overall_preference: expected an integer from -3 to 3, got {show(preference)}")
    keys = ("response1", "response2") if preference < 0 else ("response2", "response1")
    sides = [get(row, key, location) for key in keys]
    prompt, (chosen, rejected) = _pair_up(get(row, "context", location), sides, "context", keys, location)
    if preference == 0:
        on_tie(Tie(location, "overall_preference: is 0, expected a response to be preferred"))
        return []
    return [_distinct(PreferenceRow(prompt, chosen, rejected, location), keys)]


def _ranked(row: dict[str, Any], location: Location, pairing: str, on_tie: OnBad) -> list[PreferenceRow]:
    completions = row["completions"]
    if not isinstance(completions, list) or len(completions) < 2 or not all(isinstance(c, dict) for c in completions):
        raise BadRow(location, f"completions: expected a list of two or more objects with rank and completion, got {show(completions)}")
    ranks = [get(c, "rank", location, f"completions[{i}].rank") for i, c in enumerate(completions)]
    for i, rank in enumerate(ranks):
        if not isinstance(rank, int) or isinstance(rank, bool):
            raise BadRow(location, f"completions[{i}].rank: expected an integer, got {show(rank)}")
    best_first = sorted(range(len(ranks)), key=lambda i: ranks[i])
    if pairing == "all":
        chosen_rejected = list(combinations(best_first, 2))
    else:
        chosen_rejected = [(best_first[0], ranks.index(max(ranks)))]
    keys = [f"completions[{i}].completion" for i in range(len(completions))]
    sides = [get(c, "completion", location, key) for c, key in zip(completions, keys, strict=True)]
    prompt, sides = _pair_up(get(row, "context", location), sides, "context", keys, location)
    pairs = []
    for i, j in chosen_rejected:
        if ranks[i] == ranks[j]:
            both = "all" if len(set(ranks)) == 1 else f"{i} and {j}"
            on_tie(Tie(location, f"completions: {both} have rank {ranks[i]}, expected a better and a worse one"))
        else:
            pairs.append(_distinct(PreferenceRow(prompt, sides[i], sides[j], location), (keys[i], keys[j])))
    return pairs


def _demonstration(row: dict[str, Any], location: Location) -> tuple[Text, Text]:
    if _has(row, "completion") or not _has(row, "messages"):
        sides = [get(row, "completion", location)]
        prompt, (completion,) = _pair_up(get(row, "prompt", location), sides, "prompt", ("completion",), location)
        return prompt, completion
    messages = conversation(row["messages"], "messages", location)
    cut = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), 0)
    if cut == 0:
        raise BadRow(location, f"messages: expected a prompt and then an answer, got the roles {[m['role'] for m in messages][:4]}")
    return messages[:cut], completion_text(messages[cut:], "messages", location)


def _distinct(row: PreferenceRow, keys: Sequence[str]) -> PreferenceRow:
    if row.chosen == row.rejected:
        raise BadRow(row.location, f"{keys[0]} and {keys[1]} are identical, expected two different completions")
    return row


def _begin_alike(sides: Sequence[Any]) -> bool:
    """Whether both sides are conversations that hold the prompt themselves."""
    return all(isinstance(side, list) and len(side) > 1 for side in sides) and sides[0][0] == sides[1][0]


def _split_prompt(chosen: Any, rejected: Any, keys: Sequence[str], location: Location) -> tuple[Any, list[Any]]:
    """The longest common beginning of two conversations, or of two transcripts up to the assistant's turn, and what is left of each."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = chosen.rfind(HH_ASSISTANT, 0, shared_length(chosen, rejected)) + len(HH_ASSISTANT)
        if cut < len(HH_ASSISTANT):
            raise BadRow(location, f"prompt: expected the key, or {keys[0]} and {keys[1]} to share a beginning up to {HH_ASSISTANT!r}")
        for key, side in zip(keys, (chosen, rejected), strict=True):
            if HH_HUMAN in side[cut:]:
                raise BadRow(location, f"{key}: expected the transcripts to differ in the last answer only, got a later {HH_HUMAN!r}")
    else:
        both = [conversation(side, key, location) for side, key in zip((chosen, rejected), keys, strict=True)]
        cut = shared_length(*both)
        if both[0] == both[1]:
            raise BadRow(location, f"{keys[0]} and {keys[1]} are identical, expected two different completions")
        if cut == 0:
            raise BadRow(location, f"prompt: expected the key, or {keys[0]} and {keys[1]} to begin with the same messages")
    return chosen[:cut], [chosen[cut:], rejected[cut:]]


def _pair_up(prompt: Any, sides: Sequence[Any], prompt_key: str, keys: Sequence[str], location: Location) -> tuple[Text, list[Text]]:
    """Prompt and completions, checked, and all conversations if any of them is one."""
    if any(isinstance(text, list) for text in (prompt, *sides)):
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else prompt
        sides = [[{"role": "assistant", "content": side}] if isinstance(side, str) else side for side in sides]
    completions = [completion_text(side, key, location) for side, key in zip(sides, keys, strict=True)]
    return prompt_text(prompt, prompt_key, location), completions
