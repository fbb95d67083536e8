"""Columns renamed, templates filled in, long prompts filtered; what a row lacks for it is named."""

import json

import pytest

from megapref.config import Source
from megapref.data.formats import preferences_of, prompt_of
from megapref.data.rows import BadRow, Location, bad_row_handler
from megapref.data.source import Filtered, check_any, check_filter, read_source, reshape

HERE = Location("rows.jsonl", 3)
ROW = {"question": "2+2?", "context": {"page": 1}, "answer": 4, "best": "four", "worst": "five", "hint": None}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("columns", "template", "made"),
    [
        ({"prompt": "question"}, {}, {"prompt": "2+2?"}),
        ({}, {"prompt": "Q: {question}\nA:"}, {"prompt": "Q: 2+2?\nA:"}),
        ({}, {"chosen": "{{{answer}}}", "rejected": "no column"}, {"chosen": "{4}", "rejected": "no column"}),
        ({"best": "worst", "worst": "best"}, {}, {"best": "five", "worst": "four"}),
        ({"prompt": "question"}, {"question": "{question}!"}, {"prompt": "2+2?", "question": "2+2?!"}),
        (
            {},
            {"messages": [{"role": "user", "content": "{question}"}, {"role": "assistant", "content": "{best}"}]},
            {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}]},
        ),
    ],
)
def test_columns_and_templates(columns, template, made):
    shaped = reshape(ROW, columns, template, HERE)
    assert {key: shaped[key] for key in made} == made
    assert shaped.keys() == (ROW.keys() - set(columns.values())) | made.keys()


@pytest.mark.parametrize(
    ("columns", "template", "message"),
    [
        ({"prompt": "query"}, {}, "query: expected the column, which columns.prompt names, the row has"),
        ({}, {"prompt": "{query}"}, "query: expected the column, which template.prompt uses, the row has"),
        ({}, {"prompt": "{hint}"}, "hint: expected the column, which template.prompt uses"),
        ({}, {"prompt": [{"role": "user", "content": "{context}"}]}, "context: expected text or a number, which template.prompt uses, got dict"),
    ],
)
def test_rows_without_the_columns(columns, template, message):
    with pytest.raises(BadRow, match=rf"^rows.jsonl, row 3: {message}"):
        reshape(ROW, columns, template, HERE)


def test_a_file_with_names_of_its_own_gives_pairs(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROW, {"question": "3"}])
    source = Source(path, columns={"chosen": "best", "rejected": "worst"}, template={"prompt": "{question} Answer:"})
    dropped = []
    [[pair]] = read_source(source, preferences_of, bad_row_handler("skip", dropped))
    assert (pair.prompt, pair.chosen, pair.rejected) == ("2+2? Answer:", "four", "five")
    assert "row 2: best: expected the column, which columns.chosen names, the row has ['question']" in str(dropped[0])


def test_bad_rows_leave_the_others(tmp_path):
    a = Source(write(tmp_path / "a.jsonl", [{"prompt": "1"}, {"question": "2"}, {"prompt": "3"}, {"prompt": "4"}]), take=3)
    dropped = []
    assert list(read_source(a, prompt_of, bad_row_handler("skip", dropped))) == ["1", "3"]
    assert len(dropped) == 1 and f"{a.path}, row 2: prompt: expected the key" in str(dropped[0])
    with pytest.raises(BadRow, match=r"row 2: prompt: expected the key, the row has \['question'\]"):
        list(read_source(a, prompt_of, bad_row_handler("error", [])))
    with pytest.raises(ValueError, match=r"no usable row in .*a.jsonl; the first of 1 dropped rows: .*row 2"):
        check_any([], [a], dropped)


def test_prompts_over_nine_tenths_of_the_completion_are_filtered():
    source = Source("a.jsonl", filter_length=True)
    check_filter(source, range(9), 10, HERE)
    check_filter(Source("a.jsonl"), range(10), 10, HERE)
    with pytest.raises(Filtered, match=r"row 3: prompt: 10 tokens, over 0.9 \* generation.max_new_tokens=10; raise .*filter_length: false"):
        check_filter(source, range(10), 10, HERE)
