"""Every format of a row comes to one shape, and a row that fits none says where it is, what is wrong and what was expected."""

import json

import pytest

from megapref.data.conversations import MAX_CHARACTERS
from megapref.data.formats import PreferenceRow, Tie, UnpairedRow, preferences_of, prompt_of, unpaired_of
from megapref.data.rows import BadRow, Location

HERE = Location("rows.jsonl", 3)
USER, SYSTEM = {"role": "user", "content": "hi"}, {"role": "system", "content": "be kind"}
GOOD, BAD = {"role": "assistant", "content": "hello"}, {"role": "assistant", "content": "go away"}


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r", "source": "x"}, "p", "c", "r"),
        ({"prompt": "p", "chosen_response": "c", "rejected_response": "r"}, "p", "c", "r"),
        ({"prompt": "p", "completion": "c"}, "p", "c", None),
        ({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}, [SYSTEM, USER], [GOOD], [BAD]),
        ({"prompt": [USER], "chosen": "hello", "rejected": "go away"}, [USER], [GOOD], [BAD]),
        ({"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]}, [USER], [GOOD], [BAD]),
        ({"prompt": "hi", "completion": [GOOD]}, [USER], [GOOD], None),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], [GOOD], [BAD]),
        ({"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], [GOOD], [BAD]),
        ({"prompt": None, "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, [SYSTEM, USER], [GOOD], [BAD]),
        ({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, [USER, GOOD, USER], [GOOD], [BAD]),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            "\n\nHuman: a\n\nAssistant:",
            " b",
            " c",
        ),
        (
            {"context": [USER], "completions": [{"rank": 1, "completion": [BAD]}, {"rank": 0, "completion": [GOOD]}]},
            [USER],
            [GOOD],
            [BAD],
        ),
        ({"context": "p", "completions": [{"rank": r, "completion": c} for r, c in ((1, "m"), (2, "r"), (0, "c"))]}, "p", "c", "r"),
        ({"context": [USER], "response1": "hello", "response2": "go away", "overall_preference": -2}, [USER], [GOOD], [BAD]),
        ({"context": "p", "response1": "r", "response2": "c", "overall_preference": 1}, "p", "c", "r"),
        ({"messages": [SYSTEM, USER, GOOD]}, [SYSTEM, USER], [GOOD], None),
        ({"messages": [USER, GOOD, USER, BAD], "prompt": "hi"}, [USER], [GOOD, USER, BAD], None),
        # Sources that were put together have every column, null where it is another's.
        ({"prompt": "p", "chosen": "c", "rejected": "r", "completions": None, "response1": None, "completion": None}, "p", "c", "r"),
    ],
)
def test_every_format_comes_to_one_shape(row, prompt, chosen, rejected):
    [found] = preferences_of(row, HERE)
    assert (found.prompt, found.chosen, found.rejected, found.location) == (prompt, chosen, rejected, HERE)


ULTRAFEEDBACK = {
    "prompt": "hi",
    "prompt_id": "ab12",
    "chosen": [{"content": "hi", "role": "user"}, {"content": "hello", "role": "assistant"}],
    "rejected": [{"content": "hi", "role": "user"}, {"content": "go away", "role": "assistant"}],
    "messages": [{"content": "hi", "role": "user"}, {"content": "hello", "role": "assistant"}],
    "score_chosen": 8.5,
    "score_rejected": 3,
}
TULU = {
    "id": "math_1",
    "source": "tulu-3-sft-reused-on-policy-8b",
    "prompt": "And now?",
    "chosen": [USER, GOOD, {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Six."}],
    "rejected": [USER, GOOD, {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Nine."}],
    "chosen_model": "a",
    "rejected_model": "b",
}
HH = (
    "\n\nHuman: Which is the largest lake?\n\nAssistant: The Caspian Sea.\n\nHuman: And the deepest?\n\nAssistant:",
    " Lake Baikal, in Siberia.",
    " I don't know.\n\nTry a map, or an atlas.",
)
HELPSTEER = {
    "domain": "general",
    "language": "english",
    "context": [SYSTEM, USER],
    "response1": "hello",
    "response2": "go away",
    "overall_preference": -3,
    "individual_preference": [{"score": -3, "reasoning": "Response 1 is kind.", "feedback1": "kind", "feedback2": None}],
}


def test_rows_as_the_known_sets_have_them():
    assert preferences_of(ULTRAFEEDBACK, HERE) == [PreferenceRow([USER], [GOOD], [BAD], HERE, {"score_first": 8.5, "score_second": 3.0})]
    [tulu] = preferences_of(TULU, HERE)
    assert [m["content"] for m in tulu.prompt] == ["hi", "hello", "And now?"]
    assert (tulu.chosen[0]["content"], tulu.rejected[0]["content"]) == ("Six.", "Nine.")
    prompt, chosen, rejected = HH
    assert preferences_of({"chosen": prompt + chosen, "rejected": prompt + rejected}, HERE) == [PreferenceRow(*HH, HERE)]
    assert preferences_of(HELPSTEER, HERE) == [PreferenceRow([SYSTEM, USER], [GOOD], [BAD], HERE)]
    assert preferences_of(HELPSTEER | {"overall_preference": 1}, HERE) == [PreferenceRow([SYSTEM, USER], [BAD], [GOOD], HERE)]


def test_ranked_completions_make_one_pair_or_every_two():
    row = ranked(2, 0, 1, 2)
    sides = [(pair.chosen, pair.rejected) for pair in preferences_of(row, HERE)]
    assert sides == [("c1", "c0")]
    ties = []
    sides = [(pair.chosen, pair.rejected) for pair in preferences_of(row, HERE, pairing="all", on_tie=ties.append)]
    assert sides == [("c1", "c2"), ("c1", "c0"), ("c1", "c3"), ("c2", "c0"), ("c2", "c3")]
    assert len(ties) == 1 and "completions: 0 and 3 have rank 2" in str(ties[0])
    with pytest.raises(Tie, match=r"0 and 3 have rank 2.*data.ties=skip"):
        preferences_of(row, HERE, pairing="all")


@pytest.mark.parametrize("is_ranked", [False, True])
def test_ties_are_errors_or_reported(is_ranked):
    row = ranked(1, 1, 1) if is_ranked else HELPSTEER | {"overall_preference": 0}
    with pytest.raises(Tie):
        preferences_of(row, HERE)
    ties = []
    assert preferences_of(row, HERE, on_tie=ties.append) == [] and len(ties) == 1


@pytest.mark.parametrize(
    ("label", "desirable"),
    [(True, True), (False, False), (1, True), (0, False), ("desirable", True), ("undesirable", False), ("True", True), ("false", False)],
)
def test_unpaired_rows(label, desirable):
    assert unpaired_of({"prompt": "p", "completion": "c", "label": label}, HERE) == UnpairedRow("p", "c", desirable, HERE)
    assert unpaired_of({"messages": [USER, GOOD], "label": label}, HERE) == UnpairedRow([USER], [GOOD], desirable, HERE)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "yes"}, "label: expected true or false, 1 or 0, desirable or undesirable, got str 'yes'"),
        ({"label": 2}, "label: expected true or false.*got int 2"),
        ({"label": 1.0}, "label: expected true or false.*got float 1.0"),
        ({"label": [True]}, "label: expected true or false.*got list"),
        ({"label": {"is": True}}, "label: expected true or false.*got dict"),
        ({"label": None}, "label: expected the key"),
        ({"label": float("nan")}, "label: expected true or false.*got float nan"),
        ({"completion": None}, "completion: expected the key"),
        ({"completion": ""}, "completion: expected text, got an empty string"),
        ({"prompt": None}, "prompt: expected the key"),
    ],
)
def test_bad_unpaired_rows(row, message):
    with pytest.raises(BadRow, match=rf"^rows.jsonl, row 3: {message}"):
        unpaired_of({"prompt": "p", "completion": "c", "label": True} | row, HERE)


@pytest.mark.parametrize("score", ["8", True, float("nan"), float("inf"), [8]])
def test_scores_are_numbers(score):
    with pytest.raises(BadRow, match="score_rejected: expected a finite number, got"):
        preferences_of(ULTRAFEEDBACK | {"score_rejected": score}, HERE)


def ranked(*ranks):
    return {"context": "p", "completions": [{"rank": rank, "completion": f"c{i}"} for i, rank in enumerate(ranks)]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, r"has the keys \[\], expected prompt with chosen and rejected"),
        ({"text": "a"}, r"has the keys \['text'\]"),
        ({"prompt": "p", "chosen": "c"}, "rejected: expected the key"),
        ({"prompt": "p", "rejected": "c"}, "chosen: expected the key"),
        ({"prompt": "p", "chosen": "c", "rejected": None}, "rejected: expected the key"),
        ({"prompt": "p", "chosen_response": "c"}, "rejected_response: expected the key"),
        ({"completion": "c"}, "prompt: expected the key"),
        ({"prompt": "p", "completion": ""}, "completion: expected text, got an empty string"),
        ({"prompt": "", "chosen": "c", "rejected": "r"}, "prompt: expected text, got an empty string"),
        ({"prompt": "p", "chosen": "", "rejected": "r"}, "chosen: expected text, got an empty string"),
        ({"prompt": "p", "chosen": "c", "rejected": ""}, "rejected: expected text, got an empty string"),
        ({"prompt": "p", "chosen": "c", "rejected": "c"}, "chosen and rejected are identical"),
        ({"prompt": "p", "chosen": 3, "rejected": "r"}, "chosen: expected a string or a list of messages, got int 3"),
        ({"prompt": 3, "chosen": "c", "rejected": "r"}, "prompt: expected a string or a list of messages, got int 3"),
        ({"prompt": "p", "chosen": {"a": 1}, "rejected": "r"}, "chosen: expected a string or a list of messages, got dict"),
        ({"prompt": [], "chosen": "c", "rejected": "r"}, r"prompt: expected a string or a list of messages, got list \[\]"),
        ({"prompt": ["hi"], "chosen": "c", "rejected": "r"}, r"prompt\[0\]: expected a message with role and content"),
        ({"prompt": [{"role": "user"}], "chosen": "c", "rejected": "r"}, r"prompt\[0\]: expected a message with role and content"),
        ({"prompt": [{"role": "user", "content": None}], "chosen": "c", "rejected": "r"}, r"prompt\[0\]: expected a message"),
        ({"prompt": [{"role": "bot", "content": "a"}], "chosen": "c", "rejected": "r"}, r"prompt\[0\].role: expected one of .*got str 'bot'"),
        ({"prompt": [USER, SYSTEM], "chosen": "c", "rejected": "r"}, r"prompt\[1\].role: expected system only as the first"),
        ({"prompt": [USER, USER], "chosen": "c", "rejected": "r"}, r"prompt\[1\].role: expected user and assistant to take turns"),
        ({"prompt": [USER, GOOD], "chosen": "c", "rejected": "r"}, "prompt: expected the last message to be the user's"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "chosen: expected the first and last message to be of role assistant"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": ""}, "rejected: expected the assistant's message to have content"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD]}, "chosen and rejected are identical"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen and rejected are identical"),
        ({"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, "prompt: expected the key, or chosen and rejected to begin with"),
        ({"chosen": "a b", "rejected": "a c"}, "prompt: expected the key, or chosen and rejected to share a beginning up to"),
        ({"chosen": "a b", "rejected": [USER, BAD]}, "chosen: expected a list of messages, got str 'a b'"),
        (ranked(1), "completions: expected a list of two or more objects"),
        (ranked("a", 1), r"completions\[0\].rank: expected an integer, got str 'a'"),
        (ranked(True, 2), r"completions\[0\].rank: expected an integer, got bool"),
        (ranked(2, 2), "completions: all have rank 2"),
        ({"context": "p", "completions": [{"rank": 0, "completion": "a"}, {"completion": "b"}]}, r"completions\[1\].rank: expected the key"),
        ({"context": "p", "completions": [{"rank": 0}, {"rank": 1, "completion": "b"}]}, r"completions\[0\].completion: expected the key"),
        ({"completions": ranked(0, 1)["completions"]}, "context: expected the key"),
        ({"context": "p", "completions": "a"}, "completions: expected a list of two or more objects"),
        ({"context": "p", "completions": [None, None]}, "completions: expected a list of two or more objects"),
        ({"context": "p", "completions": []}, "completions: expected a list of two or more objects"),
        (ranked(float("nan"), 1), r"completions\[0\].rank: expected an integer, got float nan"),
        (ranked(1.5, 1), r"completions\[0\].rank: expected an integer, got float 1.5"),
        (ranked(None, 1), r"completions\[0\].rank: expected the key"),
        ({"context": "p", "completions": [{"rank": i, "completion": "c"} for i in (1, 2)]}, "are identical, expected two different"),
        ({"context": "p", "completions": [{"rank": 1, "completion": ""}, {"rank": 2, "completion": "c"}]}, "expected text, got an empty"),
        (HELPSTEER | {"overall_preference": 4}, "overall_preference: expected an integer from -3 to 3, got int 4"),
        (HELPSTEER | {"overall_preference": "-1"}, "overall_preference: expected an integer from -3 to 3, got str '-1'"),
        (HELPSTEER | {"overall_preference": -1.5}, "overall_preference: expected an integer from -3 to 3, got float -1.5"),
        (HELPSTEER | {"overall_preference": True}, "overall_preference: expected an integer from -3 to 3, got bool True"),
        (HELPSTEER | {"overall_preference": None}, "overall_preference: expected the key"),
        (HELPSTEER | {"response2": None}, "response2: expected the key"),
        (HELPSTEER | {"response2": "hello"}, "response1 and response2 are identical"),
        (HELPSTEER | {"context": None}, "context: expected the key"),
        (HELPSTEER | {"context": [SYSTEM, USER, GOOD]}, "context: expected the last message to be the user's"),
        ({"prompt": "p", "completion": "c", "label": True}, "label: expected a pair or a demonstration, got an unpaired row"),
        ({"messages": [GOOD]}, r"messages: expected a prompt and then an answer, got the roles \['assistant'\]"),
        ({"messages": [SYSTEM, USER]}, r"messages: expected a prompt and then an answer, got the roles \['system', 'user'\]"),
        ({"messages": [USER, GOOD, USER]}, "messages: expected the first and last message to be of role assistant"),
        ({"messages": {"role": "user"}}, "messages: expected a string or a list of messages, got dict"),
        ({"prompt": [USER, None], "chosen": "c", "rejected": "r"}, r"prompt\[1\]: expected a message with role and content.*got NoneType"),
        ({"prompt": [{"role": None, "content": "a"}], "chosen": "c", "rejected": "r"}, r"prompt\[0\]: expected a message"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "chosen": "c", "rejected": "r"}, r"prompt\[0\]: expected a"),
        ({"prompt": [USER], "chosen": [GOOD, BAD], "rejected": [BAD]}, r"chosen\[1\].role: expected user and assistant to take turns"),
        ({"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]}, "chosen: expected the first and last message to be of role assistant"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, r"rejected: expected a string or a list of messages, got list \[\]"),
        ({"chosen": HH[0] + " a", "rejected": HH[0]}, "rejected: expected text, got an empty string"),
        ({"chosen": HH[0] + " a", "rejected": HH[0] + " b\n\nHuman: c\n\nAssistant: d"}, "rejected: expected the transcripts to differ in the last"),
        ({"prompt": "p\ud800", "chosen": "c", "rejected": "r"}, "prompt: expected Unicode text, got half a surrogate pair at character 2"),
        ({"prompt": [{"role": "user", "content": "\udc00"}], "chosen": "c", "rejected": "r"}, r"prompt\[0\].content: expected Unicode text"),
        ({"prompt": "p", "chosen": "x" * 10_000_000, "rejected": "r"}, "chosen: expected at most 4,000,000 characters, got 10,000,000"),
        ({"prompt": "p", "chosen": 10_000 * ["x" * 1_000], "rejected": "r"}, r"chosen\[0\]: expected a message with role and content"),
        ({f"{i}" * 1_000: 1 for i in range(10)}, "has the keys .*, expected prompt with chosen and rejected"),
        ({"first row's prompt": "p", "first row's answer": "c"}, "has the keys .*first row's answer"),
    ],
)
def test_bad_rows_say_where_what_and_what_was_expected(row, message):
    with pytest.raises(BadRow, match=rf"^rows.jsonl, row 3: .*{message}") as error:
        preferences_of(row, HERE)
    assert "repair the row, or set data." in str(error.value) and len(str(error.value)) < 450
    assert isinstance(error.value, Tie) == (row == ranked(2, 2))


@pytest.mark.parametrize("prompt", ["p", [USER], [SYSTEM, USER], [USER, GOOD, USER], [{"role": "developer", "content": "be kind"}, USER]])
def test_prompt_rows(prompt):
    assert prompt_of({"prompt": prompt, "answer": 4}, HERE) == prompt
    if isinstance(prompt, list):
        assert prompt_of({"messages": prompt, "prompt": None}, HERE) == prompt


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "p"}, r"prompt: expected the key, the row has \['question'\]"),
        ({"prompt": None}, "prompt: expected the key"),
        ({"prompt": ""}, "prompt: expected text, got an empty string"),
        ({"prompt": 3}, "prompt: expected a string or a list of messages, got int 3"),
        ({"messages": [USER, GOOD]}, "messages: expected the last message to be the user's"),
        ({"prompt": "x" * (MAX_CHARACTERS + 1)}, "prompt: expected at most 4,000,000 characters"),
        ({"prompt": {"text": "x" * 10_000_000}}, "prompt: expected a string or a list of messages, got dict"),
        (json.loads('{"prompt": "\\ud83d"}'), "prompt: expected Unicode text, got half a surrogate pair at character 1"),
    ],
)
def test_bad_prompt_rows(row, message):
    with pytest.raises(BadRow, match=rf"^rows.jsonl, row 3: {message}") as error:
        prompt_of(row, HERE)
    assert len(str(error.value)) < 300
