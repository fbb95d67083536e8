"""Turns text into tokens: standard strings and conversations, through the tokenizer's own special tokens or its chat template.

Prompt and completion are tokenised as one text, once, and split where the prompt's text ends: what is trained is exactly what the tokenizer
makes of the whole. A token that holds both the end of the prompt and the beginning of the completion is the completion's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import batched, groupby
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megapref.data.formats import Message, Text, shared_length
from megapref.data.rows import BadRow, Location

ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class RenderedRow:
    """The text of a row as the tokenizer gets it: the prompt, and each completion as what follows it. `columns` pass through."""

    prompt: str
    completions: tuple[str, ...]
    is_chat: bool
    location: Location
    columns: dict[str, Any]


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder or hub name. ValueError where there is none, or it has no EOS token or no character offsets."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        where = "the folder has no tokenizer that can be loaded" if Path(path).is_dir() else "no such folder, nor a name on the hub"
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"model.tokenizer={path}: {where} ({first_line}); give a folder with tokenizer.json, or a hub name") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.tokenizer={path}: has no EOS token, so no completion could end; set eos_token in tokenizer_config.json")
    if not tokenizer.is_fast:
        raise ValueError(f"model.tokenizer={path}: has no tokenizer.json, so it cannot say where tokens lie in the text; convert it to one")
    return tokenizer


def render(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completions: Iterable[Text], location: Location, columns: dict[str, Any]
) -> RenderedRow:
    """The row as text. Strings stay as they are; conversations go through the chat template, the prompt up to where the assistant answers.

    BadRow where the template refuses the row or does not keep the prompt in front; ValueError where a conversation meets no chat template.
    """
    if isinstance(prompt, str):
        return RenderedRow(prompt, tuple(completions), False, location, columns)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{location}: holds a conversation, but the tokenizer {tokenizer.name_or_path} has no chat template; "
            "use an instruct model's tokenizer, put chat_template.jinja into its folder, or give plain strings"
        )
    opened = _apply_template(tokenizer, prompt, location, add_generation_prompt=True)
    bare = None
    texts = []
    for completion in completions:
        whole = _apply_template(tokenizer, prompt + completion, location, add_generation_prompt=False)
        if not whole.startswith(opened):
            # Some templates open an answer otherwise than they write it, with a thinking block for one; then what both share is the prompt.
            bare = bare or _apply_template(tokenizer, prompt, location, add_generation_prompt=False)
            opened = opened[: shared_length(opened, whole)]
            if not opened.startswith(bare):
                raise BadRow(location, "the chat template changes the prompt when an answer follows, expected it to stay")
        texts.append(whole)
    return RenderedRow(opened, tuple(_end_at_eos(tokenizer, text[len(opened) :]) for text in texts), True, location, columns)


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[Message], location: Location, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        raise BadRow(location, f"the chat template refuses the messages ({error})") from error


def _end_at_eos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    # Generation stops at EOS: what a template writes after it (a line break, mostly) is never sampled, so it is not trained on either.
    stripped = text.rstrip()
    return stripped if stripped.endswith(tokenizer.eos_token) else text


def tokenize(tokenizer: PreTrainedTokenizerBase, rows: Iterable[RenderedRow]) -> Iterator[tuple[RenderedRow, list[int], list[list[int]]]]:
    """Each row with the tokens of its prompt, special tokens in front, and those of its completions, which all end with EOS."""
    for is_chat, run in groupby(rows, key=lambda row: row.is_chat):
        for chunk in batched(run, ROWS_AT_ONCE):
            texts = [row.prompt + completion for row in chunk for completion in row.completions or ("",)]
            encoded = tokenizer(texts, add_special_tokens=not is_chat, return_offsets_mapping=True, verbose=False)
            sides = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            for row in chunk:
                if row.completions:
                    prompt_ids, completion_ids = _split(row.prompt, [next(sides) for _ in row.completions])
                    yield row, prompt_ids, [_with_eos(ids, tokenizer.eos_token_id) for ids in completion_ids]
                else:
                    yield row, _without_added_eos(tokenizer, row.prompt, next(sides)[0]), []


def _split(prompt: str, sides: list[tuple[list[int], list[tuple[int, int]]]]) -> tuple[list[int], list[list[int]]]:
    """The tokens of the prompt, which all sides begin with and which end within its text, and what is left of each side."""
    within = min(next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(offsets)) for _, offsets in sides)
    shared = sides[0][0][:within]
    for ids, _ in sides[1:]:
        shared = shared[: shared_length(shared, ids)]
    return shared, [ids[len(shared) :] for ids, _ in sides]


def _with_eos(ids: list[int], eos_id: int) -> list[int]:
    return ids if ids and ids[-1] == eos_id else [*ids, eos_id]


def _without_added_eos(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> list[int]:
    # Some tokenizers close every text with EOS; a prompt is to be continued.
    added = bool(ids) and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if added else ids
