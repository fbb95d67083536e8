"""Candidates to pairs: who samples them, which are compared, which comparisons are trained on, what is counted."""

import math

import pytest

from megapref.batch import Completion, Judgement, Prompt
from megapref.data.prompts import rounds
from megapref.online.judges import ask_judge, ask_rewards, decide_by_judge, decide_by_rewards
from megapref.online.pairs import models_of, online_pairs

PROMPTS = [Prompt([1], "a", {}, 0), Prompt([2], "b", {}, 1)]


def generator(texts: dict[str, str], finished: bool = True):
    """Candidate of side s: character s of the prompt's text here, its code the only token."""

    def generate(prompts, model, *, step, side):
        made = [texts[prompt.text][s] for prompt, s in zip(prompts, side, strict=True)]
        return [Completion([ord(text)], text + model[0], finished) for text in made]

    return generate


def digit(prompts, completions):
    return [float(c.text[0]) if c.text[0].isdigit() else None for c in completions]


def batch_of(texts, decide, candidates="policy_policy", number=4, pairing="best_worst", by_scores=True, **options):
    how = {"models": models_of(candidates, number), "pairing": pairing, "by_scores": by_scores, **options}
    (batch,) = online_pairs([(3, PROMPTS)], generator(texts), decide, **how)
    return batch


def pairs_of(batch):
    return [(chr(*pair.first_ids), chr(*pair.second_ids), pair.preference) for pair in batch.pairs]


def by_digit(ties):
    return decide_by_rewards(ask_rewards({"digit": digit}), {"digit": 1.0}, 0.0, ties)


REWARDS = by_digit("skip")


def test_best_against_worst_of_four():
    batch = batch_of({"a": "3915", "b": "x202"}, REWARDS)
    assert batch.step == 3 and pairs_of(batch) == [("9", "1", 1.0), ("2", "0", 1.0)]
    assert [contest.scores for contest in batch.contests] == [[3, 9, 1, 5], [None, 2, 0, 2]]
    assert batch.sums["objective/scores_margin"] == (10, 2) and batch.sums["objective/scores"] == (22, 7)
    assert batch.sums["judge/abstained"] == (4, 0)  # the second prompt's: three with x, one tie
    assert [row["first"] for row in batch.samples] == ["9p", "2p"]


def test_all_pairs_of_three():
    batch = batch_of({"a": "313", "b": "xxx"}, REWARDS, number=3, pairing="all")
    assert pairs_of(batch) == [("3", "1", 1.0), ("1", "3", 0.0)]
    assert [(c.first, c.second, c.preference, c.trained) for c in batch.contests[0].comparisons] == [
        *((0, 1, 1.0, True), (0, 2, None, False), (1, 2, 0.0, True))
    ]
    assert [row["preference"] for row in batch.samples] == [1.0, 0.0, None]


@pytest.mark.parametrize(("ties", "expected"), [("first", [("5", "5", 1.0)] * 2), ("soft", [("5", "5", 0.5)] * 2), ("skip", [])])
def test_ties_of_all(ties, expected):
    assert pairs_of(batch_of({"a": "5555", "b": "5555"}, by_digit(ties))) == expected


def test_of_two_models_one_candidate_each_makes_a_pair():
    texts = {"a": "9184", "b": "0550"}  # the policy has the first two
    batch = batch_of(texts, REWARDS, candidates="policy_reference", pairing="all")
    assert pairs_of(batch) == [("9", "8", 1.0), ("9", "4", 1.0), ("1", "8", 0.0), ("1", "4", 0.0), ("0", "5", 0.0), ("5", "0", 1.0)]
    assert [c.text for c in batch.contests[0].candidates] == ["9p", "1p", "8r", "4r"]
    batch = batch_of(texts, REWARDS, candidates="policy_reference")
    assert pairs_of(batch) == [("1", "8", 0.0), ("0", "5", 0.0)]  # a tie of differences: the first
    assert models_of("policy_reference", 3) == ("policy", "policy", "reference")


def test_first_only_drops_the_opponents_sample_after_it_judged():
    soft = decide_by_rewards(ask_rewards({"digit": digit}), {"digit": 1.0}, 0.0, "skip", soft_preference=True)
    batch = batch_of({"a": "31", "b": "55"}, soft, candidates="policy_mixture", number=2, first_only=True, mixture_coef=lambda step: step / 10)
    assert [(pair.first_ids, pair.second_ids) for pair in batch.pairs] == [([ord("3")], ()), ([ord("5")], ())]
    assert [pair.preference for pair in batch.pairs] == [pytest.approx(1 / (1 + math.exp(-2))), 0.5]
    assert [c.text for c in batch.contests[0].candidates] == ["3p", "1m"]
    assert batch.sums["objective/scores"] == batch.sums["scores/policy"] == (8, 2) and batch.sums["scores/mixture"] == (6, 2)
    assert batch.sums["mixture_coef"] == (0.3, 1)


def test_a_judge_holds_a_tournament():
    beats = {"21", "13", "23"}  # first beats second

    def judge(prompts, first, second):
        winners = [a.text[0] + b.text[0] in beats for a, b in zip(first, second, strict=True)]
        return [None if "x" in a.text + b.text else 0.9 if won else 0.1 for a, b, won in zip(first, second, winners, strict=True)]

    batch = batch_of({"a": "123", "b": "1x3"}, decide_by_judge(ask_judge(judge), None), number=3, by_scores=False)
    assert pairs_of(batch) == [("2", "3", 0.9), ("1", "3", 0.9)]
    assert [contest.scores for contest in batch.contests] == [[None] * 3] * 2


def test_abstained_pairs_are_left_out_and_counted():
    judge = lambda p, a, b: Judgement([None, 0.25], [None, "B"], {"judge/calls": (2, 0)})  # noqa: E731
    batch = batch_of({"a": "56", "b": "78"}, decide_by_judge(ask_judge(judge), None), number=2, by_scores=False)
    assert pairs_of(batch) == [("7", "8", 0.25)] and batch.sums["judge/calls"] == (2, 0)
    assert batch.sums["judge/abstained"] == (1, 0) and batch.sums["val/contain_eos_token"] == (4, 4)
    assert [(c.trained, c.text) for contest in batch.contests for c in contest.comparisons] == [(False, None), (True, "B")]


@pytest.mark.parametrize(
    ("start", "sync_every", "total", "expected"),
    [(0, 1, 3, [[0], [1], [2]]), (0, 3, 7, [[0, 1, 2], [3, 4, 5], [6]]), (4, 4, 8, [[4, 5, 6, 7]]), (5, 3, 9, [[5], [6, 7, 8]])],
)
def test_rounds_begin_at_multiples_and_end_with_the_run(start, sync_every, total, expected):
    made = rounds(((step, PROMPTS) for step in range(start, 100)), sync_every, total)
    assert [[step for step, _ in next(made)] for _ in expected] == expected


def test_a_round_is_sampled_at_once_and_judged_step_by_step():
    asked = []
    generate = generator({"a": "31", "b": "29"})

    def and_note(prompts, model, *, step, side):
        asked.append((len(prompts), step, side))
        return generate(prompts, model, step=step, side=side)

    steps = ((step, PROMPTS[: 1 + step % 2]) for step in range(4, 100))
    batches = online_pairs(steps, and_note, REWARDS, models=models_of("policy_policy", 2), pairing="all", by_scores=True, sync_every=2, total_steps=6)
    first, second = next(batches), next(batches)
    assert asked == [(6, [4, 4, 5, 5, 5, 5], [0, 1] * 3)]
    assert (first.step, second.step) == (4, 5) and pairs_of(first) == [("3", "1", 1.0)] and pairs_of(second) == [("3", "1", 1.0), ("2", "9", 0.0)]
    assert [batch.sums["generation/staleness"] for batch in (first, second)] == [(0, 1), (1, 1)]
    assert first.sums["time/generate"][0] > 0 and second.sums["time/generate"] == (0.0, 1)
