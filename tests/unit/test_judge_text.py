"""Verdicts read from answers, and what asking in both orders gives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapref.online.judge_text import of_all_orders, read_json, read_letter


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", 1.0),
        (" B.\n", 0.0),
        ("C", 0.5),
        ("tie", 0.5),
        ("**B**", 0.0),
        ("[[A]]", 1.0),
        ("Answer A is rude. My verdict: B", 0.0),
        ("The better answer is A.", 1.0),
        ("B: it is kinder than the other one, which shouts", 0.0),
        ("A\nbecause it is kind", 1.0),
        ("(B) is better", 0.0),
        ("A good answer has more detail", None),  # the article
        ("I like vitamins", None),
        ("ABBA", None),
        ("a", None),
        ("", None),
    ],
)
def test_letters(text, verdict):
    assert read_letter(text) == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"preference": "A"}', 1.0),
        ('```json\n{"reason": "b {", "preference": " b "}\n```', 0.0),
        ('{"preference": "tie"}', 0.5),
        ('{"preference": 0.25}', 0.25),
        ('{"preference": "A"} no, {"preference": "B"}', 0.0),
        ('{"preference": "A"} {"other": 1}', 1.0),
        ('{"preference": true}', None),
        ('{"preference": 1.5}', None),
        ('{"preference": "D"}', None),
        ('{"preference": NaN}', None),
        ('{"preference": "A"', None),
        ("A", None),
    ],
)
def test_json(text, verdict):
    assert read_json(text, "preference") == verdict


@given(st.text())
def test_any_text_is_read_without_error(text):
    assert read_letter(text) in (None, 0.0, 0.5, 1.0)
    assert read_json("{" + text, "x") in (None, 0.0, 0.5, 1.0)


def test_both_orders_are_averaged_and_one_alone_is_no_verdict():
    preferences, sums = of_all_orders([1.0, 1.0, 0.8, None, 0.5], [0.0, 1.0, 0.4, 1.0, 0.5])
    assert preferences == [1.0, 0.5, pytest.approx(0.7), None, 0.5]
    assert sums == {"judge/agreement": (3, 4), "judge/position_bias": (pytest.approx(0 + 0.5 + 0.1 + 0), 4)}
    assert of_all_orders([1.0, None]) == ([1.0, None], {})
