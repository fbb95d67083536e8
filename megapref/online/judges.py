"""From completions to preferences: rewards summed and compared, or a judge asked.

`ask_rewards` and `ask_judge` run the user's functions, each process on its share of the pairs. What `decide_by_rewards` and `decide_by_judge` do with
the answers is arithmetic and may be done by every process alike.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from megapref.batch import Completion, Judge, Judgement, Prompt, Reward, asks


@dataclass(frozen=True)
class Verdicts:
    """P(first is better) of each pair (None: no pair), with what is behind it: scores and a judge's raw answers, where there are any.

    `sums` has (sum, count) of the metrics of rewards and judge.
    """

    preferences: list[float | None]
    first_scores: list[float | None]
    second_scores: list[float | None]
    texts: list[str | None]
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)


Values = dict[str, float | None]  # what each reward gives for one completion
Score = Callable[[list[Prompt], list[Completion]], list[Values]]
OF_TIES = {"first": 1.0, "skip": None, "soft": 0.5}
Decide = Callable[[list[Prompt], list[Completion], list[Completion]], Verdicts]


def ask_rewards(rewards: dict[str, Reward]) -> Score:
    """What every reward gives for each completion, by name; coroutine functions run concurrently.

    ValueError when one raises, or gives anything but one finite number or None (it abstains) for each completion.
    """

    def ask(prompts: list[Prompt], completions: list[Completion]) -> list[Values]:
        keys = {f"reward.{name}": reward for name, reward in rewards.items()}
        answers, rule = _ask(keys, prompts, completions), "a list with one finite number or None for each completion"
        columns = [_checked(answers[key], key, len(prompts), rule) for key in keys]
        return [dict(zip(rewards, row, strict=True)) for row in zip(*columns, strict=True)]

    return ask


def ask_judge(judge: Judge) -> Callable[..., Judgement]:
    """The judge's answer, checked: ValueError when it raises, or gives anything but a probability or None (it abstains) for each pair."""

    def ask(prompts: list[Prompt], first: list[Completion], second: list[Completion]) -> Judgement:
        answer = _ask({"judge": judge}, prompts, first, second)["judge"]
        if not isinstance(answer, Judgement):
            answer = Judgement(answer, [None] * len(prompts))
        preferences = _checked(answer.preferences, "judge", len(prompts), "a list with a probability in [0, 1] or None for each pair")
        outside = next((p for p in preferences if p is not None and not 0 <= p <= 1), None)
        if outside is not None:
            raise ValueError(f"judge: gave {outside}, but P(first is better) lies in [0, 1]; None abstains")
        return Judgement(preferences, answer.texts, answer.sums)

    return ask


def total(values: Values, weights: dict[str, float], missing_eos_penalty: float, completion: Completion) -> float | None:
    """The weighted sum of a completion's values, less `missing_eos_penalty` where it did not end; None where all rewards abstain."""
    given = [weights[name] * value for name, value in values.items() if value is not None]
    return sum(given) - (0.0 if completion.finished else missing_eos_penalty) if given else None


def decide_by_rewards(score: Score, weights: dict[str, float], missing_eos_penalty: float, ties: str, *, soft_preference: bool = False) -> Decide:
    """Prefers the higher score; equal scores make no pair (`ties` "skip"), an even preference ("soft"), or prefer the first ("first").

    With `soft_preference` the preference is the sigmoid of the difference of scores instead (Bradley and Terry), ties or not.
    """

    def compare(a: float | None, b: float | None) -> float | None:
        if a is None or b is None:
            return None
        if soft_preference:
            return 0.5 * (1 + math.tanh((a - b) / 2))  # the sigmoid, without overflow
        return OF_TIES[ties] if a == b else float(a > b)

    def decide(prompts: list[Prompt], first: list[Completion], second: list[Completion]) -> Verdicts:
        # A candidate of several pairs is scored once.
        once = {id(completion): (prompt, completion) for prompt, completion in zip(prompts * 2, first + second, strict=True)}
        values = score([prompt for prompt, _ in once.values()], [completion for _, completion in once.values()])
        totals = {key: total(of, weights, missing_eos_penalty, completion) for (key, (_, completion)), of in zip(once.items(), values, strict=True)}
        first_scores, second_scores = ([totals[id(completion)] for completion in side] for side in (first, second))
        preferences = [compare(a, b) for a, b in zip(first_scores, second_scores, strict=True)]
        return Verdicts(preferences, first_scores, second_scores, [None] * len(prompts), _means_by_reward(values, weights))

    return decide


def decide_by_judge(ask: Callable[..., Judgement], decide_rewards: Decide | None, ties: str = "soft") -> Decide:
    """Prefers what the judge prefers, `ties` being verdicts of 0.5; rewards, when there are any, are computed for the log alone."""

    def decide(prompts: list[Prompt], first: list[Completion], second: list[Completion]) -> Verdicts:
        judged, nothing = ask(prompts, first, second), [None] * len(prompts)
        scored = decide_rewards(prompts, first, second) if decide_rewards else Verdicts(nothing, nothing, nothing, nothing)
        given = [p for p in judged.preferences if p is not None]
        sums = scored.sums | judged.sums | {"judge/even": (given.count(0.5), len(given))}
        preferences = [OF_TIES[ties] if p == 0.5 else p for p in judged.preferences]
        return Verdicts(preferences, scored.first_scores, scored.second_scores, judged.texts, sums)

    return decide


def _means_by_reward(values: list[Values], weights: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Of each reward where there are several; of one alone `objective/scores` says it."""
    columns = {name: [of[name] for of in values if of[name] is not None] for name in weights} if len(weights) > 1 else {}
    return {f"objective/scores_{name}": (sum(column), len(column)) for name, column in columns.items()}


def _ask(functions: dict[str, Callable[..., Any]], prompts: list[Prompt], *completions: list[Completion]) -> dict[str, Any]:
    """What the user's functions give, by their keys. ValueError with the line in it that raised."""
    if not prompts and not any(map(asks, functions.values())):
        return dict.fromkeys(functions, ())  # a rank without prompts: no function has to mind that, but those that compute with other ranks
    later = [key for key, function in functions.items() if inspect.iscoroutinefunction(function)]
    answers = {}
    for key, function in functions.items():
        if key not in later:
            with _errors_of(key):
                answers[key] = function(prompts, *completions)

    async def answer(key: str) -> Any:
        with _errors_of(key):
            return await functions[key](prompts, *completions)

    async def gather() -> list[Any]:
        return await asyncio.gather(*map(answer, later))

    return answers | dict(zip(later, asyncio.run(gather()) if later else (), strict=True))


@contextmanager
def _errors_of(key: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the user's code may raise anything
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__][-3:]
        where = "".join(f"\n  {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames)
        raise ValueError(f"{key}: its function raised {type(error).__name__}: {error}{where}") from error


def _checked(values: Any, key: str, expected: int, rule: str) -> list[float | None]:
    if not isinstance(values, list | tuple) or len(values) != expected:
        got = f"{len(values)} values" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
        raise ValueError(f"{key}: gave {got} for {expected} rows; it must give {rule}")
    for i, value in enumerate(values):
        if value is not None and (isinstance(value, str) or not isinstance(value, Real) or not math.isfinite(value)):
            raise ValueError(f"{key}: gave {value!r} for row {i}; it must give {rule}")
    return [None if value is None else float(value) for value in values]
