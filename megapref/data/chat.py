"""Turns text into tokens: standard strings and conversations, through the tokenizer's own special tokens or its chat template.

Prompt and completion are tokenised as one text, once, and split where the prompt's text ends: what is trained is exactly what the tokenizer
makes of the whole. A token that holds both the end of the prompt and the beginning of the completion is the completion's. Of a completion of
several messages the assistant's are found in the same text, by rendering the conversation up to each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched, groupby
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megapref.data.conversations import Message, Text, shared_length
from megapref.data.rows import BadRow, Location
from megapref.data.spm import from_sentencepiece

ROWS_AT_ONCE = 512
Span = tuple[int, int]  # first character, and the one after the last


@dataclass(frozen=True)
class RenderedRow:
    """The text of a row as the tokenizer gets it: the prompt, and each completion as what follows it. `columns` pass through.

    `trained` has the spans of each completion that are trained, None where all of it is. `ids`, of prompt and completions, where they are known
    already: then nothing is tokenised.
    """

    prompt: str
    completions: tuple[str, ...]
    trained: tuple[list[Span] | None, ...]
    is_chat: bool
    location: Location
    columns: dict[str, Any]
    preference: float = 1.0  # that the first completion is better
    ended: tuple[bool, ...] | None = None  # whether each completion ends with EOS; None: all do
    ids: tuple[list[int], list[list[int]]] | None = None


class TokenizedRow(NamedTuple):
    """A row's tokens: the prompt's, special tokens in front, the completions', which end with EOS, and which of these are trained (None: all)."""

    row: RenderedRow
    prompt_ids: list[int]
    completion_ids: list[list[int]]
    masks: list[list[bool] | None]


def load_tokenizer(path: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder or hub name, or of a SentencePiece .model file or a folder with one; `chat_template`: a Jinja file.

    ValueError where there is none, or it has no EOS token or no character offsets, or the template is not Jinja.
    """
    pieces = _sentencepiece_file(Path(path))
    tokenizer = from_sentencepiece(pieces) if pieces else _from_hugging_face(path)
    if tokenizer.vocab_size <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without tokenizer files
        raise ValueError(f"model.tokenizer={path}: has no vocabulary; give a folder with tokenizer.json, or a hub name")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.tokenizer={path}: has no EOS token, so no completion could end; set eos_token in tokenizer_config.json")
    if not tokenizer.is_fast:
        raise ValueError(f"model.tokenizer={path}: has no tokenizer.json, so it cannot say where tokens lie in the text; convert it to one")
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
        _check_template(tokenizer, chat_template)
    return tokenizer


def render(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    completions: Sequence[Text],
    location: Location,
    columns: dict[str, Any],
    train_on: str = "final",
) -> RenderedRow:
    """The row as text. Strings stay as they are; conversations go through the chat template, the prompt up to where the assistant answers.

    `train_on`: final | all_assistant, the messages of a completion that are trained. BadRow where the template refuses the row or does not
    keep the messages in front; ValueError where a conversation meets no chat template.
    """
    if isinstance(prompt, str):
        return RenderedRow(prompt, tuple(completions), (None,) * len(completions), False, location, columns)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{location}: holds a conversation, but the tokenizer {tokenizer.name_or_path} has no chat template; "
            "use an instruct model's tokenizer, set model.chat_template to a Jinja file, or give plain strings"
        )
    if train_on == "final" and len(completions) == 1:  # no other side to share a prompt with: all but the answer is the prompt
        prompt, completions = prompt + completions[0][:-1], [completions[0][-1:]]
    wholes = [_apply_template(tokenizer, prompt + completion, location, add_generation_prompt=False) for completion in completions]
    start = _answers_start(tokenizer, prompt, wholes, location)
    if not wholes:
        return RenderedRow(start, (), (), True, location, columns)
    cut = len(start)
    trained = []
    for completion, whole in zip(completions, wholes, strict=True):
        spans = _trained_spans(tokenizer, prompt, completion, whole, train_on, location) if len(completion) > 1 else None
        trained.append(spans and [(begin - cut, end - cut) for begin, end in spans])
    return RenderedRow(start, tuple(_end_at_eos(tokenizer, whole[cut:]) for whole in wholes), tuple(trained), True, location, columns)


def _answers_start(tokenizer: PreTrainedTokenizerBase, messages: list[Message], wholes: Sequence[str], location: Location) -> str:
    """The text of the messages up to where the assistant's answer begins in all of the `wholes`, which go on after them."""
    start = _apply_template(tokenizer, messages, location, add_generation_prompt=True)
    if all(whole.startswith(start) for whole in wholes):
        return start
    # Some templates open an answer otherwise than they write it, with a thinking block for one; then what all share is the prompt.
    for whole in wholes:
        start = start[: shared_length(start, whole)]
    if not start.startswith(_apply_template(tokenizer, messages, location, add_generation_prompt=False)):
        raise BadRow(location, "the chat template changes the prompt when an answer follows, expected it to stay")
    return start


def _trained_spans(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], completion: list[Message], whole: str, train_on: str, location: Location
) -> list[Span]:
    """Where in the whole text the assistant's answers are that are trained, each with its end of turn."""
    spans = []
    for i, message in enumerate(completion):
        is_final = i == len(completion) - 1
        if message["role"] == "assistant" and (is_final or train_on == "all_assistant"):
            begin = len(_answers_start(tokenizer, prompt + completion[:i], [whole], location))
            until = whole if is_final else _apply_template(tokenizer, prompt + completion[: i + 1], location, add_generation_prompt=False)
            if not whole.startswith(until):
                raise BadRow(location, "the chat template changes an answer when messages follow, expected it to stay (data.train_on)")
            spans.append((begin, begin + len(_end_at_eos(tokenizer, until[begin:]))))
    return spans


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[Message], location: Location, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        raise BadRow(location, f"the chat template refuses the messages ({error})") from error


def _end_at_eos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    # Generation stops at EOS: what a template writes after it (a line break, mostly) is never sampled, so it is not trained on either.
    stripped = text.rstrip()
    return stripped if stripped.endswith(tokenizer.eos_token) else text


def tokenize(tokenizer: PreTrainedTokenizerBase, rows: Iterable[RenderedRow]) -> Iterator[TokenizedRow]:
    """The tokens of each row, in order."""
    for (is_chat, has_ids), run in groupby(rows, key=lambda row: (row.is_chat, row.ids is not None)):
        if has_ids:
            yield from (TokenizedRow(row, *row.ids, list(row.trained)) for row in run)
            continue
        for chunk in batched(run, ROWS_AT_ONCE):
            texts = [row.prompt + completion for row in chunk for completion in row.completions or ("",)]
            encoded = tokenizer(texts, add_special_tokens=not is_chat, return_offsets_mapping=True, verbose=False)
            sides = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            for row in chunk:
                if row.completions:
                    yield _split(row, [next(sides) for _ in row.completions], tokenizer.eos_token_id)
                else:
                    yield TokenizedRow(row, _without_added_eos(tokenizer, row.prompt, next(sides)[0]), [], [])


def _split(row: RenderedRow, sides: list[tuple[list[int], list[Span]]], eos_id: int) -> TokenizedRow:
    """The prompt's tokens are those that all sides begin with and that end within its text; what is left of a side is the completion's."""
    border = len(row.prompt)
    within = min(next((i for i, (_, end) in enumerate(offsets) if end > border), len(offsets)) for _, offsets in sides)
    prompt_ids = sides[0][0][:within]
    for ids, _ in sides[1:]:
        prompt_ids = prompt_ids[: shared_length(prompt_ids, ids)]
    completions, masks = [], []
    for (ids, offsets), spans, ended in zip(sides, row.trained, row.ended or (True,) * len(sides), strict=True):
        completion = ids[len(prompt_ids) :]
        mask = None if spans is None else _mask(offsets[len(prompt_ids) :], spans, border)
        if not ended and completion[-1:] == [eos_id]:  # the template wrote what was never sampled
            completion = completion[:-1]
        if ended and completion[-1:] != [eos_id]:
            completion = [*completion, eos_id]
            mask = None if mask is None else [*mask, True]
        completions.append(completion)
        masks.append(mask)
    return TokenizedRow(row, prompt_ids, completions, masks)


def _mask(offsets: list[Span], spans: list[Span], border: int) -> list[bool]:
    """Whether each token has a character in a trained span; a span at the border has all that the completion has before it, too."""
    whole = [(border + begin if begin else 0, border + end) for begin, end in spans]
    return [any(first < end and last > begin for begin, end in whole) for first, last in offsets]


def _without_added_eos(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> list[int]:
    # Some tokenizers close every text with EOS; a prompt is to be continued.
    added = bool(ids) and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if added else ids


def _from_hugging_face(path: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        where = "the folder has no tokenizer that can be loaded" if Path(path).is_dir() else "no such folder, nor a name on the hub"
        first_line = str(error).partition("\n")[0]
        raise ValueError(
            f"model.tokenizer={path}: {where} ({first_line}); give a folder with tokenizer.json, a SentencePiece .model file or a hub name"
        ) from error


def _read_template(file: str) -> str:
    try:
        return Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"model.chat_template={file}: cannot be read ({error}); give a Jinja file in UTF-8") from error


def _check_template(tokenizer: PreTrainedTokenizerBase, file: str) -> None:
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"model.chat_template={file}: line {error.lineno} is not Jinja ({error.message}); repair it") from error
    except jinja2.TemplateError:  # it refuses this conversation, for want of a system message perhaps; the rows may suit it
        pass


def _sentencepiece_file(path: Path) -> Path | None:
    """The .model file that the tokenizer has to be made from: the path itself, or the only one in a folder that says nothing else of a tokenizer."""
    if path.is_file():
        return path
    if not path.is_dir() or (path / "tokenizer.json").exists() or (path / "tokenizer_config.json").exists():
        return None
    files = sorted(path.glob("*.model"))
    return files[0] if len(files) == 1 else None
