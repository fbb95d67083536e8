"""From completions to preferences: rewards summed and compared, or a judge asked."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from megapref.batch import Completion, Judge, Prompt, Reward


@dataclass(frozen=True)
class Verdicts:
    """P(first is better) of each pair (None: no pair), with the scores behind it where there are any."""

    preferences: list[float | None]
    first_scores: list[float | None]
    second_scores: list[float | None]


Decide = Callable[[list[Prompt], list[Completion], list[Completion]], Verdicts]


def score(
    rewards: dict[str, tuple[Reward, float]], missing_eos_penalty: float, prompts: list[Prompt], completions: list[Completion]
) -> list[float | None]:
    """The weighted sum of the rewards of each completion; a reward that gives None abstains, and where all do the score is None.

    `missing_eos_penalty` is subtracted from the score of a completion that did not end. ValueError when a reward gives anything but
    one finite number or None for each completion.
    """
    totals: list[float | None] = [None] * len(prompts)
    for name, (reward, weight) in rewards.items():
        values = _ask(f"reward.{name}", reward, prompts, completions, rule="one finite number or None")
        for i, value in enumerate(values):
            if value is not None:
                totals[i] = (totals[i] or 0.0) + weight * value
    return [
        total if total is None or completion.finished else total - missing_eos_penalty
        for total, completion in zip(totals, completions, strict=True)
    ]


def decide_by_rewards(rewards: dict[str, tuple[Reward, float]], missing_eos_penalty: float, ties: str) -> Decide:
    """Prefers the higher score; equal scores make no pair (`ties` "skip"), an even preference ("soft"), or prefer the first ("first")."""
    preference_of_tie = {"first": 1.0, "skip": None, "soft": 0.5}[ties]

    def decide(prompts: list[Prompt], first: list[Completion], second: list[Completion]) -> Verdicts:
        scores = score(rewards, missing_eos_penalty, prompts * 2, first + second)
        first_scores, second_scores = scores[: len(prompts)], scores[len(prompts) :]

        def compare(a: float | None, b: float | None) -> float | None:
            if a is None or b is None:
                return None
            return preference_of_tie if a == b else float(a > b)

        preferences = [compare(a, b) for a, b in zip(first_scores, second_scores, strict=True)]
        return Verdicts(preferences, first_scores, second_scores)

    return decide


def decide_by_judge(judge: Judge, decide_rewards: Decide | None) -> Decide:
    """Asks the judge; rewards, when there are any, are computed for the log alone. ValueError for a value outside [0, 1]."""

    def decide(prompts: list[Prompt], first: list[Completion], second: list[Completion]) -> Verdicts:
        preferences = _ask("judge", judge, prompts, first, second, rule="a probability in [0, 1] or None")
        outside = next((p for p in preferences if p is not None and not 0 <= p <= 1), None)
        if outside is not None:
            raise ValueError(f"judge: gave {outside}, but P(first is better) lies in [0, 1]; None abstains")
        nothing = [None] * len(prompts)
        scored = decide_rewards(prompts, first, second) if decide_rewards else Verdicts(nothing, nothing, nothing)
        return Verdicts(preferences, scored.first_scores, scored.second_scores)

    return decide


def _ask(key: str, function: Callable[..., list], prompts: list[Prompt], *completions: list[Completion], rule: str) -> list[float | None]:
    """What the user's function gives, checked. ValueError with the line in it that raised, or with the value that breaks the rule."""
    if not prompts:
        return []  # a rank without prompts: no function has to mind that
    try:
        values = function(prompts, *completions)
    except Exception as error:  # the user's code may raise anything
        frames = traceback.extract_tb(error.__traceback__)[1:][-3:]
        where = "".join(f"\n  {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames)
        raise ValueError(f"{key}: its function raised {type(error).__name__}: {error}{where}") from error
    return _checked(values, key, len(prompts), rule)


def _checked(values, key: str, expected: int, rule: str) -> list[float | None]:
    if not isinstance(values, list | tuple) or len(values) != expected:
        got = f"{len(values)} values" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
        raise ValueError(f"{key}: gave {got} for {expected} completions; it must give a list with {rule} for each")
    for i, value in enumerate(values):
        if value is not None and (isinstance(value, str) or not isinstance(value, Real) or not math.isfinite(value)):
            raise ValueError(f"{key}: gave {value!r} for completion {i}; it must give {rule}")
    return [None if value is None else float(value) for value in values]
