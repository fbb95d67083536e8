"""Rewards that need no model: each returns one score per completion, or None where it abstains.

A reward is any function `(prompts, completions, *, params) -> list[float | None]`; these are the built-in ones. They look at the text of a
completion, its tokens and the other columns of its prompt's row. A wrong parameter or a row without its column raises ValueError.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megapref.batch import Completion, Prompt


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words as they stand in a sentence, without stemming, so that a reader can check a score by eye.
KIND_WORDS = _words(
    """adored amazing attentive beautiful best bright brilliant charming cheerful clean clever comfortable cosy courteous crisp delicious
    delight delighted delightful elegant enchanting enjoyed excellent fair fantastic fascinating fine fresh friendly funny generous
    gentle glad gladly good gorgeous graceful great gripping happily happy helpful imaginative impressed inspiring joy kind love
    loved lovely magical marvellous memorable moving outstanding patient peaceful perfect pleasant pleased pleasure polite praised
    pretty reasonable recommend refreshing relaxing remarkable smooth splendid spotless stunning superb sweet tasty tender thoughtful touching
    treat warm welcoming witty wonderful worth"""
)
UNKIND_WORDS = _words(
    """angry annoyed annoying appalling arrogant awful bad bland bleak boring burnt careless chaotic clumsy complained confusing cramped
    damp dirty disappointed disappointing disappointment disliked dismal dismissive dreadful dreary dull dusty filthy forgettable frustrating
    gloomy greasy grim grumpy hated horrible impatient lifeless loathed lousy mediocre miserable mistake nasty neglected noisy
    outrageous overcooked overpriced pointless poor predictable regret regretted ridiculous rude sad shabby shallow shocking slow
    soggy sour stale stuffy surly tasteless tedious terrible ugly unbearable unfriendly unhelpful unpleasant waste worse worst"""
)
NEGATIONS = _words("not never no nothing hardly")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def sentiment(prompts: Sequence[Prompt], completions: Sequence[Completion], *, min_sentences: int = 3) -> list[float]:
    """How kind each completion is, in [-1, 1]: the mean over its sentences of kind words minus unkind words, clipped to [-1, 1].

    Up to two words after a negation a word counts for its opposite. A sentence of fewer than three words counts 0, and one that says
    an earlier one again (all words of one of them stand in the other) counts -1.
    The sum over fewer than `min_sentences` sentences is divided by that number all the same, so that one short phrase cannot win.
    Empty or gibberish text scores 0. ValueError if `min_sentences` is under 1.
    """
    if min_sentences < 1:
        raise ValueError(f"reward parameter min_sentences={min_sentences} must be at least 1")
    return [_sentiment(completion.text, min_sentences) for completion in completions]


def _sentiment(text: str, min_sentences: int) -> float:
    sentences = [tuple(re.findall(r"[a-z']+", sentence)) for sentence in re.split(r"[.!?]+", text.lower())]
    sentences = [words for words in sentences if words]
    total = 0
    for number, words in enumerate(sentences):
        if any(set(words) <= set(earlier) or set(earlier) <= set(words) for earlier in sentences[:number]):
            total -= 1
        elif len(words) >= 3:
            total += max(-1, min(1, sum(_polarity(words, position) for position in range(len(words)))))
    return total / max(len(sentences), min_sentences)


def _polarity(words: Sequence[str], position: int) -> int:
    polarity = (words[position] in KIND_WORDS) - (words[position] in UNKIND_WORDS)
    negated = not NEGATIONS.isdisjoint(words[max(0, position - 2) : position])
    return -polarity if negated else polarity


def length(prompts: Sequence[Prompt], completions: Sequence[Completion], *, target: int) -> list[float]:
    """How near each completion's number of tokens n is to `target`: 1 - |n - target| / target, at least 0."""
    if target < 1:
        raise ValueError(f"reward parameter target={target} must be at least 1 token")
    return [max(0.0, 1 - abs(len(completion.ids) - target) / target) for completion in completions]


def regex(prompts: Sequence[Prompt], completions: Sequence[Completion], *, pattern: str) -> list[float]:
    """1.0 for each completion in which the regular expression `pattern` is found (anchor it with ^ and $ to match the whole text), else 0.0."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"reward parameter pattern={pattern!r} is not a regular expression: {error}") from error
    return [float(compiled.search(completion.text) is not None) for completion in completions]


def keyword(prompts: Sequence[Prompt], completions: Sequence[Completion], *, words: Sequence[str]) -> list[float]:
    """The share of `words` that stand in each completion as whole words, in upper or lower case."""
    if isinstance(words, str) or not words:
        raise ValueError(f"reward parameter words={words!r} must be a list of at least one word, such as [thank, you]")
    patterns = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE) for word in words]
    return [sum(p.search(completion.text) is not None for p in patterns) / len(patterns) for completion in completions]


def format(
    prompts: Sequence[Prompt], completions: Sequence[Completion], *, tags: Sequence[str] = (), sections: Sequence[str] = ()
) -> list[float]:
    """The share of required parts that each completion has, once and in this order: `tags`, <tag>text</tag>, and then `sections`, each a line
    of its own such as "## Summary" with text below it."""
    for name, value in (("tags", tags), ("sections", sections)):
        if isinstance(value, str):
            raise ValueError(f"reward parameter {name}={value!r} must be a list, such as [{value}]")
    parts = [re.compile(rf"<{tag}>(.*?)</{tag}>", re.DOTALL) for tag in map(re.escape, tags)]
    parts += [re.compile(rf"^{section}[ \t]*$\s*(\S?)", re.MULTILINE) for section in map(re.escape, sections)]
    if not parts:
        raise ValueError("reward format needs parameter tags or sections, a list of what a completion must have")
    return [_share_in_order(parts, completion.text) for completion in completions]


def _share_in_order(parts: Sequence[re.Pattern], text: str) -> float:
    position = present = 0
    for part in parts:
        found = list(part.finditer(text))
        if len(found) == 1 and found[0][1].strip() and found[0].start() >= position:
            position, present = found[0].end(), present + 1
    return present / len(parts)


def same_answer(
    prompts: Sequence[Prompt], completions: Sequence[Completion], *, column: str = "answer", pattern: str = r"<answer>(.*?)</answer>"
) -> list[float | None]:
    """1.0 for each completion in which what the last match of `pattern` has in its group is the text in the row's `column`, else 0.0.

    Upper and lower case and white space make no difference. The column's value null makes the reward abstain.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"reward parameter pattern={pattern!r} is not a regular expression: {error}") from error
    if compiled.groups != 1:
        raise ValueError(f"reward parameter pattern={pattern!r} must have one group, in parentheses, where the answer stands")
    scores: list[float | None] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        expected, given = _expected(prompt, column, "same_answer"), compiled.findall(completion.text)
        scores.append(None if expected is None else float(bool(given) and _plain(given[-1]) == _plain(str(expected))))
    return scores


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _expected(prompt: Prompt, column: str, reward: str) -> Any:
    if column not in prompt.row:
        raise ValueError(
            f"prompt row {prompt.index} has no column {column!r}, which reward {reward} compares with; "
            f"its columns are {sorted(prompt.row)}: set the reward's params.column to one of them"
        )
    return prompt.row[column]


def final_answer(
    prompts: Sequence[Prompt], completions: Sequence[Completion], *, column: str = "answer", markers: Sequence[str] = ("####", "A:")
) -> list[float | None]:
    """1.0 for each completion whose last number after a marker equals the answer in the row's `column`, else 0.0.

    The column holds a number, or a worked solution that itself ends with a marker and a number. Its value null makes the reward abstain.
    """
    if isinstance(markers, str) or not markers:
        raise ValueError(f"reward parameter markers={markers!r} must be a list of at least one text, such as ['####']")
    return [_final_answer(prompt, completion.text, column, markers) for prompt, completion in zip(prompts, completions, strict=True)]


def _final_answer(prompt: Prompt, text: str, column: str, markers: Sequence[str]) -> float | None:
    answer = _expected(prompt, column, "final_answer")
    if answer is None:
        return None
    expected = _number_after(str(answer), markers)
    if expected is None:
        expected = _number_after(f"{markers[0]} {answer}", markers)
    if expected is None:
        raise ValueError(f"prompt row {prompt.index}: column {column!r} holds no number to compare with: {str(answer)[:80]!r}")
    return float(_number_after(text, markers) == expected)


def _number_after(text: str, markers: Sequence[str]) -> float | None:
    """The first number after the last marker, on that marker's line."""
    start = max((text.rfind(marker) + len(marker) for marker in markers if marker in text), default=None)
    if start is None:
        return None
    match = _NUMBER.search(text[start:].split("\n")[0])
    return float(match.group().replace(",", "")) if match else None
