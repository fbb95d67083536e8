"""Scores and preferences: weights, abstention, ties, penalties, and what user functions may get wrong."""

import math

import pytest

from megapref.batch import Completion, Prompt
from megapref.online.judges import decide_by_judge, decide_by_rewards, score
from megapref.online.pairs import evaluate, online_pairs, summarise

PROMPTS = [Prompt([1], "a", {}, 0), Prompt([2], "b", {}, 1)]
DONE = [Completion([5], "x", True), Completion([6], "yy", True)]
OPEN = [Completion([7], "zzz", False), Completion([8], "w", True)]


def text_length(prompts, completions):
    return [float(len(c.text)) for c in completions]


def test_weighted_sum_and_abstention():
    never = lambda prompts, completions: [None, 2.0]  # noqa: E731
    assert score({"a": (text_length, 0.5), "b": (never, 10.0)}, 0.0, PROMPTS, DONE) == [0.5, 21.0]
    assert score({"b": (never, 1.0)}, 0.0, PROMPTS, DONE) == [None, 2.0]


def test_missing_eos_is_penalised_by_the_completion_alone():
    assert score({"a": (text_length, 1.0)}, 5.0, PROMPTS, OPEN) == [-2.0, 1.0]


@pytest.mark.parametrize(("ties", "expected"), [("first", 1.0), ("skip", None), ("soft", 0.5)])
def test_ties(ties, expected):
    decide = decide_by_rewards({"same": (lambda p, c: [1.0] * len(c), 1.0)}, 0.0, ties)
    assert decide(PROMPTS, DONE, OPEN).preferences == [expected] * 2


def test_higher_score_is_preferred():
    verdicts = decide_by_rewards({"a": (text_length, 1.0)}, 0.0, "skip")(PROMPTS, DONE, OPEN)
    assert verdicts.preferences == [0.0, 1.0] and verdicts.second_scores == [3.0, 1.0]


@pytest.mark.parametrize(
    ("values", "said"),
    [([1.0], "1 values"), (None, "NoneType"), ([math.nan, 1, 1, 1], "nan"), (["good", 1, 1, 1], "'good'"), ([math.inf, 0, 0, 0], "inf")],
)
def test_a_wrong_reward_is_named(values, said):
    with pytest.raises(ValueError, match=r"reward\.mine") as caught:
        decide_by_rewards({"mine": (lambda p, c: values, 1.0)}, 0.0, "skip")(PROMPTS, DONE, OPEN)
    assert said in str(caught.value)


def test_a_judge_outside_the_unit_interval_is_named():
    with pytest.raises(ValueError, match=r"judge: gave 1.5"):
        decide_by_judge(lambda p, a, b: [0.5, 1.5], None)(PROMPTS, DONE, OPEN)


def test_abstained_pairs_are_left_out_and_counted():
    generate = lambda prompts, model, *, step, side: (DONE + OPEN)[: len(prompts)]  # noqa: E731
    decide = decide_by_judge(lambda p, a, b: [None, 0.25], None)
    (batch,) = online_pairs([(3, PROMPTS)], generate, decide, candidates="policy_policy")
    assert batch.step == 3 and [tuple(pair.first_ids) for pair in batch.pairs] == [(6,)]
    assert batch.pairs[0].preference == 0.25 and batch.sums["judge/abstained"] == (1, 0)
    assert batch.sums["val/contain_eos_token"] == (3, 4)


def test_evaluation_means_and_interval():
    decide = decide_by_rewards({"a": (text_length, 1.0)}, 0.0, "soft")
    values, rows = evaluate(PROMPTS, DONE, OPEN, decide(PROMPTS, DONE, OPEN))
    summary = summarise(values)
    assert summary["eval/win_rate"] == 0.5 and summary["eval/reward"] == 1.5 and summary["eval/reward_reference"] == 2.0
    assert summary["eval/win_rate_ci"] == pytest.approx(1.96 * (0.5 / 2) ** 0.5) and rows[0]["policy"] == "x"
