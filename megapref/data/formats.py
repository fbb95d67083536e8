"""Brings every format of a row to one of two shapes: a prompt, or a `PreferenceRow`. What does not fit is a `BadRow`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megapref.data.rows import BadRow, Location, show

Message = dict[str, str]  # role, content
Text = str | list[Message]
ROLES = ("system", "developer", "user", "assistant", "tool")
HH_ASSISTANT = "\n\nAssistant:"


class Tie(BadRow):
    """A ranked row that prefers neither completion."""


@dataclass(frozen=True)
class PreferenceRow:
    """A prompt with its chosen and rejected completion, all strings or all conversations; without `rejected` it is a demonstration."""

    prompt: Text
    chosen: Text
    rejected: Text | None
    location: Location
    extras: dict[str, float] = field(default_factory=dict)


def prompt_of(row: dict[str, Any], location: Location) -> Text:
    """The prompt of a prompt-only row: a string or a conversation that awaits an answer. Other columns are left to judges and rewards."""
    return _prompt(_get(row, "prompt", location), "prompt", location)


def preference_of(row: dict[str, Any], location: Location) -> PreferenceRow:
    """The pair of a row in any of the preference formats, or its demonstration if it has `prompt` and `completion`.

    Formats: prompt/chosen/rejected, chosen/rejected that begin alike, context/completions with ranks (lower is better; best against worst),
    prompt/chosen_response/rejected_response, prompt/completion.
    """
    if "completions" in row:
        return _ranked(row, location)
    if "chosen" in row or "rejected" in row:
        keys = ("chosen", "rejected")
    elif "chosen_response" in row or "rejected_response" in row:
        keys = ("chosen_response", "rejected_response")
    elif "completion" in row:
        sides = [_get(row, "completion", location)]
        prompt, (completion,) = _pair_up(_get(row, "prompt", location), sides, "prompt", ("completion",), location)
        return PreferenceRow(prompt, completion, None, location)
    else:
        expected = "prompt with chosen and rejected, context with completions, or prompt with completion"
        raise BadRow(location, f"has the keys {sorted(row)}, expected {expected}")
    sides = [_get(row, key, location) for key in keys]
    if row.get("prompt") is None or (isinstance(row["prompt"], str) and _begin_alike(sides)):
        prompt, sides = _split_prompt(*sides, keys, location)
    else:
        prompt = row["prompt"]
    prompt, (chosen, rejected) = _pair_up(prompt, sides, "prompt", keys, location)
    return _distinct(PreferenceRow(prompt, chosen, rejected, location), keys)


def _ranked(row: dict[str, Any], location: Location) -> PreferenceRow:
    completions = _get(row, "completions", location)
    if not isinstance(completions, list) or len(completions) < 2 or not all(isinstance(c, dict) for c in completions):
        raise BadRow(location, f"completions: expected a list of two or more objects with rank and completion, got {show(completions)}")
    ranks = [_get(c, "rank", location, f"completions[{i}].rank") for i, c in enumerate(completions)]
    for i, rank in enumerate(ranks):
        if not isinstance(rank, int) or isinstance(rank, bool):
            raise BadRow(location, f"completions[{i}].rank: expected an integer, got {show(rank)}")
    if min(ranks) == max(ranks):
        raise Tie(location, f"completions: all have rank {ranks[0]}, expected a better and a worse one")
    order = (ranks.index(min(ranks)), ranks.index(max(ranks)))
    keys = tuple(f"completions[{i}].completion" for i in order)
    sides = [_get(completions[i], "completion", location, key) for i, key in zip(order, keys, strict=True)]
    prompt, (chosen, rejected) = _pair_up(_get(row, "context", location), sides, "context", keys, location)
    return _distinct(PreferenceRow(prompt, chosen, rejected, location), keys)


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
    else:
        both = [_messages(side, key, location) for side, key in zip((chosen, rejected), keys, strict=True)]
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
    completions = [_completion(side, key, location) for side, key in zip(sides, keys, strict=True)]
    return _prompt(prompt, prompt_key, location), completions


def _prompt(value: Any, key: str, location: Location) -> Text:
    if isinstance(value, str):
        if not value:
            raise BadRow(location, f"{key}: expected text, got an empty string")
        return value
    messages = _messages(value, key, location)
    if messages[-1]["role"] == "assistant":
        raise BadRow(location, f"{key}: expected the last message to be the user's, got one of role assistant")
    return messages


def _completion(value: Any, key: str, location: Location) -> Text:
    if isinstance(value, str):
        if not value:
            raise BadRow(location, f"{key}: expected text, got an empty string")
        return value
    messages = _messages(value, key, location)
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        roles = [message["role"] for message in messages]
        raise BadRow(location, f"{key}: expected the first and last message to be of role assistant, got {roles}")
    if not messages[-1]["content"]:
        raise BadRow(location, f"{key}: expected the assistant's message to have content, got an empty string")
    return messages


def _messages(value: Any, key: str, location: Location) -> list[Message]:
    if not isinstance(value, list) or not value:
        expected = "a list of messages" if isinstance(value, str) else "a string or a list of messages"
        raise BadRow(location, f"{key}: expected {expected}, got {show(value)}")
    messages: list[Message] = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise BadRow(location, f"{key}[{i}]: expected a message with role and content, both strings, got {show(message)}")
        role = message["role"]
        if role not in ROLES:
            raise BadRow(location, f"{key}[{i}].role: expected one of {', '.join(ROLES)}, got {role!r}")
        if role == "system" and i > 0:
            raise BadRow(location, f"{key}[{i}].role: expected system only as the first message")
        if messages and role == messages[-1]["role"] and role in ("user", "assistant"):
            raise BadRow(location, f"{key}[{i}].role: expected user and assistant to take turns, got {role} twice")
        messages.append({"role": role, "content": message["content"]})
    return messages


def _get(row: dict[str, Any], key: str, location: Location, name: str | None = None) -> Any:
    if row.get(key) is None:
        raise BadRow(location, f"{name or key}: expected the key, the row has {sorted(map(str, row))}")
    return row[key]


def shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
