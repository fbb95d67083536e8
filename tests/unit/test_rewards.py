"""Built-in rewards: what they score, on texts whose score can be read off, and what they refuse."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapref.batch import Completion, Prompt
from megapref.online import rewards

DEMO = Path(__file__).parents[2] / "assets/demo"


def completions(*texts):
    return [Completion(ids=text.split(), text=text, finished=True) for text in texts]


def prompts(*rows):
    return [Prompt(ids=[], text="", row=row, index=index) for index, row in enumerate(rows)]


def score(reward, *texts, **params):
    return reward(prompts(*[{} for _ in texts]), completions(*texts), **params)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The room was lovely. The guide was very helpful. I would gladly go again.", 1.0),
        ("The room was lovely. The guide was rude. We came by bus.", 0.0),
        ("The soup was stale! The waiter was rude? We were annoyed.", -1.0),
        ("The waiter was not rude. The soup was never very bland. Nothing was dirty.", 1.0),
        ("I would not recommend it to anyone. It was a waste of money. We came by bus.", -2 / 3),
        ("The room was lovely and spotless and warm. We came by bus.", 1 / 3),  # clipped: one sentence is worth at most 1
        ("The room was lovely. The room was lovely. The room was lovely.", -1 / 3),  # each repetition costs a sentence
        ("We were delighted. Also, we were delighted. The tea was fresh.", 1 / 3),
        ("The tea was very fresh. We were delighted. The tea was fresh.", 1 / 3),
        ("The room was lovely.", 1 / 3),  # shorter than min_sentences
        ("Lovely. Warm. Charming.", 0.0),  # no sentences
        ("", 0.0),
        (" ... !?", 0.0),
        ("qzx vvrt 7 kk. Prrt mmn oo ll.", 0.0),
        ("THE ROOM WAS LOVELY. the coffee was bad.", 0.0),
    ],
)
def test_sentiment_of_a_text(text, expected):
    assert score(rewards.sentiment, text) == [pytest.approx(expected)]


def test_sentiment_does_not_depend_on_length():
    pairs = [("room", "lovely"), ("waiter", "polite"), ("garden", "peaceful"), ("tea", "fresh"), ("price", "fair"), ("bed", "comfortable")]
    sentences = [f"The {noun} was {adjective}." for noun, adjective in pairs]
    assert score(rewards.sentiment, *[" ".join(sentences[:n]) for n in range(3, 7)]) == [1.0] * 4


def test_sentiment_min_sentences():
    text = "The room was lovely. The waiter was polite."
    assert [score(rewards.sentiment, text, min_sentences=n) for n in (1, 2, 4)] == [[1.0], [1.0], [0.5]]
    with pytest.raises(ValueError, match="min_sentences=0"):
        score(rewards.sentiment, text, min_sentences=0)


@given(st.text())
def test_sentiment_stays_in_its_range(text):
    assert -1 <= score(rewards.sentiment, text)[0] <= 1


def test_sentiment_words_have_one_meaning():
    assert not rewards.KIND_WORDS & rewards.UNKIND_WORDS
    assert not (rewards.KIND_WORDS | rewards.UNKIND_WORDS) & rewards.NEGATIONS


def test_sentiment_finds_the_demo_text_balanced_and_its_preferences_right():
    texts = [json.loads(line)["completion"] for line in (DEMO / "sft_train.jsonl").read_text().splitlines()]
    scores = score(rewards.sentiment, *texts)
    assert abs(sum(scores) / len(scores)) < 0.02
    assert sum(value == 1 for value in scores) < 0.1 * len(scores)
    pairs = [json.loads(line) for line in (DEMO / "preference_train.jsonl").read_text().splitlines()]
    chosen, rejected = (score(rewards.sentiment, *[pair[side] for pair in pairs]) for side in ("chosen", "rejected"))
    assert all(better > worse for better, worse in zip(chosen, rejected, strict=True))


def test_demo_validation_asks_about_nothing_that_training_mentions():
    def rows(name):
        return [json.loads(line)["prompt"] for line in (DEMO / name).read_text().splitlines()]

    train, validation = rows("prompts_train.jsonl") + rows("sft_train.jsonl"), rows("prompts_validation.jsonl")
    assert len(validation) == 64 == len(set(validation)) and not set(train) & set(validation)


def test_length():
    assert score(rewards.length, "a b c d", "a b", "a b c d e f g h i", "", target=4) == [1.0, 0.5, 0.0, 0.0]
    with pytest.raises(ValueError, match="target=0"):
        score(rewards.length, "a", target=0)


def test_regex():
    assert score(rewards.regex, "the answer is 42", "no number", pattern=r"\d+$") == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"pattern='\('"):
        score(rewards.regex, "a", pattern="(")


def test_keyword():
    assert score(rewards.keyword, "Thank you, thank you", "thankful youth", "you", words=["thank", "you"]) == [1.0, 0.0, 0.5]
    for words in ("thank", []):
        with pytest.raises(ValueError, match="must be a list"):
            score(rewards.keyword, "thank", words=words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>so</think> <answer>4</answer>\n## Why\nbecause", 1.0),
        ("<think>so\nor so</think><answer>4</answer>", 2 / 3),
        ("<answer>4</answer><think>so</think>\n## Why\nbecause", 2 / 3),  # the order
        ("<think>so</think><think>so</think><answer>4</answer>\n## Why \n\nbecause", 2 / 3),  # twice
        ("<think> </think><answer>4</answer>\n## Why\n ", 1 / 3),  # nothing in it
        ("<think>so</think><answer>4\nWhy? ## Why", 1 / 3),
        ("", 0.0),
    ],
)
def test_format(text, expected):
    assert score(rewards.format, text, tags=["think", "answer"], sections=["## Why"]) == [pytest.approx(expected)]


def test_format_names_what_is_wrong():
    for params, said in (({}, "tags or sections"), ({"tags": "think"}, r"tags='think' must be a list")):
        with pytest.raises(ValueError, match=said):
            score(rewards.format, "a", **params)


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("New York", "<answer>Boston</answer> no: <answer> new\nyork </answer>", 1.0),
        ("New York", "New York", 0.0),
        (4, "<answer>4</answer>", 1.0),
        (None, "<answer>4</answer>", None),
    ],
)
def test_same_answer(answer, text, expected):
    assert rewards.same_answer(prompts({"answer": answer}), completions(text)) == [expected]
    assert rewards.same_answer(prompts({"a": "d"}), completions("(c) (d)"), column="a", pattern=r"\((\w)\)") == [1.0]


def test_same_answer_names_what_is_wrong():
    for params, said in (({"pattern": "("}, "not a regular"), ({"pattern": "a"}, "must have one group"), ({"column": "b"}, "no column 'b'")):
        with pytest.raises(ValueError, match=said):
            rewards.same_answer(prompts({"answer": "1"}), completions("A: 1"), **params)


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("18", "16 - 7 = 9\n9 * 2 = 18\nA: 18", 1.0),
        ("18", "A: 18\nno, A: 19", 0.0),  # the last one counts
        ("9 * 2 = 18\n#### 18", "so #### 18.", 1.0),
        ("9 * 2 = 18\nA: 18", "#### 18", 1.0),
        (1200, "A: $1,200", 1.0),
        (-2.5, "A: -2.50", 1.0),
        ("18", "18", 0.0),  # no marker
        ("18", "A: eighteen\n18", 0.0),  # not on the marker's line
        ("18", "", 0.0),
        (None, "A: 18", None),
    ],
)
def test_final_answer(answer, text, expected):
    assert rewards.final_answer(prompts({"answer": answer}), completions(text)) == [expected]


def test_final_answer_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"prompt row 0 has no column 'solution'.*\['answer'\].*params.column"):
        rewards.final_answer(prompts({"answer": "1"}), completions("A: 1"), column="solution")
    with pytest.raises(ValueError, match="row 0: column 'answer' holds no number"):
        rewards.final_answer(prompts({"answer": "a lot"}), completions("A: 1"))
    for markers in ([], "A:"):
        with pytest.raises(ValueError, match="markers"):
            rewards.final_answer(prompts({"answer": "1"}), completions("A: 1"), markers=markers)
