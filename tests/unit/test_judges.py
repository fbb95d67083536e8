"""Scores and preferences: weights, abstention, ties, penalties, and what user functions may get wrong."""

import asyncio
import math

import pytest

from megapref.batch import Completion, Judgement, Prompt
from megapref.online.judges import ask_judge, ask_rewards, decide_by_judge, decide_by_rewards, total

PROMPTS = [Prompt([1], "a", {}, 0), Prompt([2], "b", {}, 1)]
DONE = [Completion([5], "x", True), Completion([6], "yy", True)]
OPEN = [Completion([7], "zzz", False), Completion([8], "w", True)]


def text_length(prompts, completions):
    return [float(len(c.text)) for c in completions]


def by_rewards(ties="skip", penalty=0.0, weight=1.0, **rewards):
    return decide_by_rewards(ask_rewards(rewards), dict.fromkeys(rewards, weight), penalty, ties)


def constant(*values):
    return lambda prompts, completions: list(values)


def test_weighted_sum_and_abstention():
    def weighed(weights, **rewards):
        return [total(of, weights, 0.0, DONE[0]) for of in ask_rewards(rewards)(PROMPTS, DONE)]

    assert weighed({"a": 0.5, "b": 10.0}, a=text_length, b=constant(None, 2.0)) == [0.5, 21.0]
    assert weighed({"b": 1.0}, b=constant(None, 2.0)) == [None, 2.0]


def test_async_rewards_run_concurrently_and_keep_their_names():
    arrived = asyncio.Event()

    async def first(prompts, completions):
        await arrived.wait()  # would wait for ever if the other ran after it
        return [1.0, 2.0]

    async def other(prompts, completions):
        arrived.set()
        return [3.0, None]

    scored = ask_rewards({"first": first, "plain": text_length, "other": other})(PROMPTS, DONE)
    assert scored == [{"first": 1.0, "plain": 1.0, "other": 3.0}, {"first": 2.0, "plain": 2.0, "other": None}]


def test_missing_eos_is_penalised_by_the_completion_alone():
    verdicts = by_rewards(penalty=5.0, a=text_length)([Prompt([1, 6], "has the end token", {}, 0), PROMPTS[1]], OPEN, DONE)
    assert verdicts.first_scores == [-2.0, 1.0] and verdicts.second_scores == [1.0, 2.0]


def test_each_reward_of_several_is_logged():
    verdicts = by_rewards(weight=2.0, a=text_length, b=constant(4.0, None, 8.0, None))(PROMPTS, DONE, OPEN)
    assert verdicts.sums == {"objective/scores_a": (7.0, 4), "objective/scores_b": (12.0, 2)}
    assert by_rewards(a=text_length)(PROMPTS, DONE, OPEN).sums == {}


@pytest.mark.parametrize(("ties", "expected"), [("first", 1.0), ("skip", None), ("soft", 0.5)])
def test_ties(ties, expected):
    assert by_rewards(ties, same=constant(1.0, 1.0, 1.0, 1.0))(PROMPTS, DONE, OPEN).preferences == [expected] * 2


def test_a_completion_of_several_pairs_is_scored_once():
    seen = []
    decide = by_rewards(a=lambda p, c: seen.extend(c) or text_length(p, c))
    verdicts = decide([PROMPTS[0]] * 3, [DONE[0], DONE[0], DONE[1]], [DONE[1], OPEN[0], OPEN[0]])
    assert seen == [*DONE, OPEN[0]] and verdicts.first_scores == [1.0, 1.0, 2.0] and verdicts.second_scores == [2.0, 3.0, 3.0]


def test_higher_score_is_preferred():
    verdicts = by_rewards(a=text_length)(PROMPTS, DONE, OPEN)
    assert verdicts.preferences == [0.0, 1.0] and verdicts.second_scores == [3.0, 1.0] and verdicts.texts == [None, None]


def test_soft_preference_is_the_sigmoid_of_the_difference():
    rewards = {"a": constant(2.0, 1e4, 1.0, -1e4)}
    decide = decide_by_rewards(ask_rewards(rewards), {"a": 0.5}, 0.0, "skip", soft_preference=True)
    assert decide(PROMPTS, DONE, OPEN).preferences == [pytest.approx(1 / (1 + math.exp(-0.5))), 1.0]
    even = decide_by_rewards(ask_rewards({"a": constant(3.0, None, 3.0, 1.0)}), {"a": 1.0}, 0.0, "skip", soft_preference=True)
    assert even(PROMPTS, DONE, OPEN).preferences == [0.5, None]


@pytest.mark.parametrize(
    ("values", "said"),
    [([1.0], "1 values"), (None, "NoneType"), ([math.nan, 1, 1, 1], "nan"), (["good", 1, 1, 1], "'good'"), ([math.inf, 0, 0, 0], "inf")],
)
def test_a_wrong_reward_is_named(values, said):
    with pytest.raises(ValueError, match=r"reward\.mine") as caught:
        by_rewards(mine=lambda p, c: values)(PROMPTS, DONE, OPEN)
    assert said in str(caught.value)


def test_where_a_reward_raised_is_named():
    async def broken(prompts, completions):
        return [prompt.row["column"] for prompt in prompts]

    for reward in (broken, lambda p, c: p[0].row["column"]):
        with pytest.raises(ValueError, match=r"reward\.mine: its function raised KeyError: 'column'\n  .*test_judges.py:\d+ in"):
            by_rewards(mine=reward)(PROMPTS, DONE, OPEN)


def test_a_judge_outside_the_unit_interval_is_named():
    with pytest.raises(ValueError, match=r"judge: gave 1.5"):
        ask_judge(lambda p, a, b: [0.5, 1.5])(PROMPTS, DONE, OPEN)


@pytest.mark.parametrize(("ties", "expected"), [("first", 1.0), ("skip", None), ("soft", 0.5)])
def test_even_verdicts_are_ties(ties, expected):
    verdicts = decide_by_judge(ask_judge(lambda p, a, b: [0.5, 0.25]), None, ties)(PROMPTS, DONE, OPEN)
    assert verdicts.preferences == [expected, 0.25] and verdicts.sums["judge/even"] == (1, 2)


def test_a_judge_may_give_raw_answers_and_sums():
    decide = decide_by_judge(ask_judge(lambda p, a, b: Judgement([None, 0.25], [None, "B"], {"judge/calls": (2, 0)})), None)
    verdicts = decide(PROMPTS, DONE, OPEN)
    assert verdicts.preferences == [None, 0.25] and verdicts.texts == [None, "B"] and verdicts.sums == {"judge/calls": (2, 0), "judge/even": (0, 1)}
