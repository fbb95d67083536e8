"""Evaluation on validation prompts: sets apart and together, shares of ranks, ties, the interval, the rows' own answers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import save_tokenizer

from megapref.batch import Completion, Judgement, PairLogps, Prompt
from megapref.data.chat import load_tokenizer
from megapref.online.evaluation import evaluation, kl_to_reference, own_answers, summarise, wilson
from megapref.online.judges import ask_rewards, decide_by_judge, decide_by_rewards

SETS = {"short": [Prompt([1], "a", {}, 0)], "long": [Prompt([2, 3, number], "b" * number, {}, number) for number in range(1, 5)]}
SCORE = ask_rewards({"length": lambda prompts, completions: [float(len(c.ids)) for c in completions]})
DECIDE = decide_by_rewards(SCORE, {"length": 1.0}, 0.0, "soft")


def policy(prompts):
    return [Completion(list(prompt.ids), prompt.text, True) for prompt in prompts]


def players(rank: int = 0, num_ranks: int = 1, **changes):
    asked = []

    def opponent(prompts):
        asked.append(len(prompts))
        return [Completion([0, 0], "oo", False) for _ in prompts]

    options = {"policy": policy, "opponent": opponent, "decide": DECIDE, "kl": lambda pairs: float(sum(len(p.first_ids) for p in pairs)) / len(pairs)}
    options |= {"against": "reference", "moves": False, "rank": rank, "num_ranks": num_ranks, "gather": lambda value: [value], **changes}
    return evaluation(SETS, **options), asked


def test_named_sets_are_apart_and_together():
    evaluate, _ = players()
    metrics, rows = evaluate()
    assert metrics["validation-short_win_rate"] == 0.0 and metrics["validation-long_win_rate"] == 1.0 and metrics["eval/win_rate"] == 0.8
    assert metrics["validation-long_reward"] == 3.0 and metrics["eval/reward"] == pytest.approx(13 / 5) and metrics["eval/reward_opponent"] == 2.0
    assert metrics["validation-short_kl"] == 1.0 and metrics["eval/kl"] == pytest.approx(13 / 5)
    assert metrics["eval/length"] == pytest.approx(13 / 5) and metrics["eval/finished"] == 1.0 and metrics["eval/abstained"] == 0.0
    assert [(row["set"], row["policy"], row["score_opponent"], row["preference"]) for row in rows[:2]] == [("short", "a", 2, 0), ("long", "b", 2, 1)]


def test_every_rank_returns_what_one_process_does():
    alone, parts = players()[0](), []
    for rank in (0, 1):  # what each rank would give, then both
        players(rank, 2, gather=lambda value: parts.append(value) or [(value[0] * 2, value[1])] * 2)[0]()
    for rank in (0, 1):
        assert players(rank, 2, gather=lambda value: parts)[0]() == alone


def test_what_judging_cost_is_that_of_all_ranks():
    """Of means over both players' samples, such as each reward's, nothing is logged."""
    judge = lambda prompts, first, second: Judgement([1.0] * len(prompts), [None] * len(prompts), {"judge/requests": (2 * len(prompts), 0)})  # noqa: E731
    two_rewards = decide_by_rewards(lambda prompts, own: [{"a": 1.0, "b": 2.0}] * len(prompts), {"a": 1.0, "b": 1.0}, 0.0, "soft")
    others = {"judge/requests": (3, 0), "judge/even": (1, 3)}
    evaluate, _ = players(decide=decide_by_judge(judge, two_rewards), gather=lambda value: [value, ([], others)])
    judged = {name: value for name, value in evaluate()[0].items() if "judge" in name or "scores" in name}
    assert judged == {"eval/judge/requests": 13, "eval/judge/even": 1 / 8}


@pytest.mark.parametrize(("moves", "times"), [(False, 1), (True, 3)])
def test_an_opponent_that_does_not_move_is_asked_once(moves, times):
    evaluate, asked = players(moves=moves)
    assert evaluate() == evaluate() == evaluate()
    assert asked == [5] * times


def test_a_rank_without_prompts_asks_as_often_as_the_others():
    whole = []
    players(gather=lambda value: whole.append(value) or [value])[0]()
    evaluate, asked = players(5, 6, gather=lambda value: [([one], {}) for one in whole[0][0]] + [value])
    assert evaluate() == evaluate() and asked == [0]


def test_without_reference_or_prompts():
    assert "eval/kl" not in players(kl=None)[0]()[0]
    assert evaluation({}, **dict.fromkeys(("policy", "opponent", "decide", "kl", "against", "moves", "gather")), rank=0, num_ranks=1)() == ({}, [])


def test_rows_without_a_verdict_are_counted():
    row = {"score_policy": None, "score_opponent": None, "length_policy": 3, "length_opponent": 1, "finished": False}
    measured = summarise([row | {"preference": None}, row | {"preference": 0.5}])
    assert measured["win_rate"] == 0.5 and measured["abstained"] == 1.0 and "reward" not in measured
    assert "win_rate" not in summarise([row | {"preference": None}])


def test_wilson_interval_against_published_values():
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    for successes, trials, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert wilson(successes / trials, trials) == pytest.approx((low, high), abs=6e-5)


@given(st.floats(0, 1), st.integers(1, 1000))
def test_wilson_interval_holds_the_share(share, number):
    low, high = wilson(share, number)
    assert 0 <= low <= share + 1e-9 and share - 1e-9 <= high <= 1 and wilson(1 - share, number) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_kl_sums_tokens_of_the_first_side():
    logps = PairLogps(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -5.0]), torch.tensor([0, 0, 2]), torch.ones(2))
    assert float(kl_to_reference(logps).loss_sum) == 2.5 and kl_to_reference(logps).count == 2


def test_own_answers(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path))
    messages = [{"role": "assistant", "content": "the mat"}]
    (text, chat) = own_answers([Prompt([1], "p", {"best": "the cat"}, 0), Prompt([1], "p", {"best": messages}, 1)], "best", tokenizer)
    assert text.text == "the cat" and text.finished and tokenizer.decode(text.ids) == "the cat<|im_end|>" and chat.text == "the mat"
    for row in ({}, {"best": ""}, {"best": []}, {"best": 3}):
        with pytest.raises(ValueError, match=r"evaluation\.answers=best: expected an answer .* 'p' has .*evaluation\.against=reference"):
            own_answers([Prompt([1], "p", row, 0)], "best", tokenizer)
