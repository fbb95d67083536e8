import json

import pytest

from megapref.data.formats import Tie, preference_of, prompt_of
from megapref.data.rows import BadRow, Location, bad_row_handler, check_any, read_rows, read_sources

HERE = Location("rows.jsonl", 3)
USER, SYSTEM = {"role": "user", "content": "hi"}, {"role": "system", "content": "be kind"}
GOOD, BAD = {"role": "assistant", "content": "hello"}, {"role": "assistant", "content": "go away"}
ROWS = [{"prompt": "a", "chosen": "é", "rejected": "c"}, {"prompt": "d", "chosen": "e", "rejected": "f"}]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        path.write_text("prompt,chosen,rejected\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet

        table = pa.Table.from_pylist(rows)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_every_kind_of_file_gives_its_rows_and_their_numbers(tmp_path, kind):
    path = write(tmp_path / f"rows.{kind}", ROWS)
    assert list(read_rows(path)) == [(ROWS[0], Location(path, 1)), (ROWS[1], Location(path, 2))]
    assert [row for row, _ in read_rows(path, take=1)] == ROWS[:1]


def test_json_with_an_object_per_line_and_blank_lines(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert [(row["prompt"], location.row) for row, location in read_rows(str(path))] == [("a", 1), ("b", 3)]


def test_saved_data_sets_are_read(tmp_path):
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[1:])}).save_to_disk(tmp_path / "d")
    assert [row for row, _ in read_rows(str(tmp_path / "d"), split="test")] == ROWS[1:]
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "e")
    assert [row for row, _ in read_rows(str(tmp_path / "e"))] == ROWS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a"', "row 2: expected a JSON object on one line, got invalid JSON .* at column"),
        (b'{"prompt": "\xff"}', "row 2: expected UTF-8, got byte 0xff at byte 13"),
        (b'["a"]', r"row 2: expected an object with named keys, got list \['a'\]"),
        (b"17", "row 2: expected an object with named keys, got int 17"),
    ],
)
def test_broken_lines_are_named_or_skipped_and_kept(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "c"}\n')
    with pytest.raises(BadRow, match=message) as error:
        list(read_rows(str(path)))
    assert str(path) in str(error.value) and "data.on_bad_row=skip" in str(error.value)
    skipped = []
    rows = list(read_rows(str(path), on_bad=bad_row_handler("skip", skipped)))
    assert [row["prompt"] for row, _ in rows] == ["a", "c"] and len(skipped) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "there is no such file"),
        ("./gone", None, "there is no such file"),
        ("rows.txt", b"a", "cannot read a .txt file; use one of .jsonl"),
        ("rows.json", b"[1, 2", "expected a JSON list of objects"),
        ("rows.parquet", b"not parquet", "cannot be read as .parquet"),
        ("rows.arrow", b"not arrow", "cannot be read as .arrow"),
        ("rows.csv", b"prompt\n\xff\n", "expected CSV with a header line in UTF-8"),
        ("no-such/data-set", None, "neither a file here nor a data set that can be loaded"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"data source {name}.*{message}"):
        list(read_rows(name))


def test_a_csv_row_with_missing_fields_is_bad(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen\na,b\nc\nd,e,f\n")
    skipped = []
    assert [row for row, _ in read_rows(str(path), on_bad=skipped.append)] == [{"prompt": "a", "chosen": "b"}]
    assert [str(error).split(": ")[1].split(";")[0] for error in skipped] == ["expected as many fields as the header has"] * 2


class Source:
    def __init__(self, path, take=None):
        self.path, self.split, self.take = path, "train", take


def test_sources_follow_each_other_and_bad_rows_leave_the_others(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"prompt": "1"}, {"question": "2"}, {"prompt": "3"}])
    b = write(tmp_path / "b.jsonl", [{"prompt": "4"}, {"prompt": "5"}])
    skipped = []
    assert list(read_sources([Source(a), Source(b, take=1)], prompt_of, bad_row_handler("skip", skipped))) == ["1", "3", "4"]
    assert len(skipped) == 1 and f"{a}, row 2: prompt: expected the key" in str(skipped[0])
    with pytest.raises(BadRow, match=r"row 2: prompt: expected the key, the row has \['question'\]"):
        list(read_sources([Source(a)], prompt_of, bad_row_handler("error", [])))
    with pytest.raises(ValueError, match=r"no usable row in .*a.jsonl; the first of 1 skipped rows: .*row 2"):
        check_any([], [Source(a)], skipped)


def test_on_bad_row_has_two_values():
    with pytest.raises(ValueError, match=r"data.on_bad_row='ignore' is not known; use error or skip"):
        bad_row_handler("ignore", [])


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
    ],
)
def test_every_format_comes_to_one_shape(row, prompt, chosen, rejected):
    found = preference_of(row, HERE)
    assert (found.prompt, found.chosen, found.rejected, found.location) == (prompt, chosen, rejected, HERE)


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
        ({"prompt": [{"role": "bot", "content": "a"}], "chosen": "c", "rejected": "r"}, r"prompt\[0\].role: expected one of .*got 'bot'"),
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
    ],
)
def test_bad_rows_say_where_what_and_what_was_expected(row, message):
    with pytest.raises(BadRow, match=rf"^rows.jsonl, row 3: .*{message}") as error:
        preference_of(row, HERE)
    assert "data.on_bad_row=skip" in str(error.value) and len(str(error.value)) < 400
    assert isinstance(error.value, Tie) == (row == ranked(2, 2))


@pytest.mark.parametrize("prompt", ["p", [USER], [SYSTEM, USER], [USER, GOOD, USER]])
def test_prompt_rows(prompt):
    assert prompt_of({"prompt": prompt, "answer": 4}, HERE) == prompt


def test_a_huge_value_is_not_printed_whole():
    with pytest.raises(BadRow) as error:
        prompt_of({"prompt": {"text": "x" * 10_000_000}}, HERE)
    assert len(str(error.value)) < 300
