"""Checks of the texts in a row: strings and conversations, as a prompt or as a completion. What does not fit is a `BadRow`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megapref.data.rows import BadRow, Location, show

Message = dict[str, str]  # role, content
Text = str | list[Message]
ROLES = ("system", "developer", "user", "assistant", "tool")
# Beyond any model's context; a text of megabytes is a broken file, and would hold tokenization up for minutes.
MAX_CHARACTERS = 4_000_000


def get(row: dict[str, Any], key: str, location: Location, name: str | None = None) -> Any:
    """The value at `key`; BadRow, which calls it `name`, where there is none or null."""
    if row.get(key) is None:
        raise BadRow(location, f"{name or key}: expected the key, the row has {show_keys(row)}")
    return row[key]


def show_keys(row: dict[str, Any]) -> str:
    """The keys of a row, on one line."""
    text = str(sorted(map(str, row)))
    return text if len(text) <= 120 else f"{text[:117]}..."


def prompt_text(value: Any, key: str, location: Location) -> Text:
    """The value as a prompt: a string, or a conversation that awaits an answer."""
    if isinstance(value, str):
        return _string(value, key, location)
    messages = conversation(value, key, location)
    if messages[-1]["role"] == "assistant":
        raise BadRow(location, f"{key}: expected the last message to be the user's, got one of role assistant")
    return messages


def completion_text(value: Any, key: str, location: Location) -> Text:
    """The value as a completion: a string, or messages of which the first and the last are the assistant's."""
    if isinstance(value, str):
        return _string(value, key, location)
    messages = conversation(value, key, location)
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        roles = [message["role"] for message in messages]
        raise BadRow(location, f"{key}: expected the first and last message to be of role assistant, got {roles}")
    if not messages[-1]["content"]:
        raise BadRow(location, f"{key}: expected the assistant's message to have content, got an empty string")
    return messages


def conversation(value: Any, key: str, location: Location) -> list[Message]:
    """The value as messages whose roles can follow each other; keys other than role and content are left out."""
    if not isinstance(value, list) or not value:
        expected = "a list of messages" if isinstance(value, str) else "a string or a list of messages"
        raise BadRow(location, f"{key}: expected {expected}, got {show(value)}")
    messages: list[Message] = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise BadRow(location, f"{key}[{i}]: expected a message with role and content, both strings, got {show(message)}")
        role = message["role"]
        if role not in ROLES:
            raise BadRow(location, f"{key}[{i}].role: expected one of {', '.join(ROLES)}, got {show(role)}")
        if role == "system" and i > 0:
            raise BadRow(location, f"{key}[{i}].role: expected system only as the first message")
        if messages and role == messages[-1]["role"] and role in ("user", "assistant"):
            raise BadRow(location, f"{key}[{i}].role: expected user and assistant to take turns, got {role} twice")
        _check_characters(message["content"], f"{key}[{i}].content", location)
        messages.append({"role": role, "content": message["content"]})
    return messages


def shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _string(value: str, key: str, location: Location) -> str:
    if not value:
        raise BadRow(location, f"{key}: expected text, got an empty string")
    _check_characters(value, key, location)
    return value


def _check_characters(text: str, key: str, location: Location) -> None:
    if len(text) > MAX_CHARACTERS:
        raise BadRow(location, f"{key}: expected at most {MAX_CHARACTERS:,} characters, got {len(text):,}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(location, f"{key}: expected Unicode text, got half a surrogate pair at character {error.start + 1}") from error
