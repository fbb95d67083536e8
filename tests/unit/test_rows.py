import json

import pytest

from megapref.data.rows import BadRow, Location, bad_row_handler, read_rows

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


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_only_a_line_feed_ends_a_line(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    breaks = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh"
    lines = [json.dumps({"prompt": breaks}, ensure_ascii=False), json.dumps({"prompt": "after"})]
    path.write_bytes("\r\n".join(lines).encode())
    assert [(row["prompt"], location.row) for row, location in read_rows(str(path))] == [(breaks, 1), ("after", 2)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_an_empty_file_has_no_rows_and_a_byte_order_mark_is_no_text(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(b"")
    assert list(read_rows(str(path))) == []
    write(path, ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [row for row, _ in read_rows(str(path))] == ROWS


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
        (b"null", "row 2: expected an object with named keys, got NoneType None"),
        (b'"text"', "row 2: expected an object with named keys, got str 'text'"),
        (b'{"prompt": "a"} {"prompt": "b"}', "row 2: .*invalid JSON .Extra data at column 17"),
        (b"{'prompt': 'a'}", "row 2: .*invalid JSON .Expecting property name"),
        (b'{"prompt": "a\tb"}', "row 2: .*invalid JSON .Invalid control character"),
        (b"\xff\xfe" + '{"prompt": "a"}'.encode("utf-16-le"), "row 2: expected UTF-8, got byte 0xff at byte 1"),
        ('{"prompt": "caf\u00e9"}'.encode("latin-1"), "row 2: expected UTF-8, got byte 0xe9 at byte 16"),
        (b"[" * 200_000, "row 2: expected a JSON object on one line, got JSON that cannot be read"),
        (b'{"prompt": ' + b"9" * 10_000 + b"}", "row 2: .*cannot be read .Exceeds the limit"),
        (b'{"prompt": "' + b"x" * 10_000_000, "row 2: .*invalid JSON .*at column 10000013"),
    ],
)
def test_broken_lines_are_named_or_skipped_and_kept(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "c"}\n')
    with pytest.raises(BadRow, match=message) as error:
        list(read_rows(str(path)))
    assert str(path) in str(error.value) and "data.on_bad_row=skip" in str(error.value) and len(str(error.value)) < 400
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
        ("rows.parquet", b"not parquet", "cannot be read as Parquet"),
        ("rows.arrow", b"not arrow", "cannot be read as Arrow"),
        ("rows.csv", b"prompt\n\xff\n", "expected CSV with a header line in UTF-8"),
        ("rows.csv", b'prompt\n"open', "expected CSV with a header line in UTF-8 .unexpected end of data"),
        ("rows.csv", b"prompt,prompt\na,b\n", "expected CSV .* has a name twice"),
        ("rows.json", b"[" * 200_000, "expected a JSON list of objects"),
        ("rows.parquet", b"", "cannot be read as Parquet"),
        ("rows.jsonl.gz", b"a", "cannot read a .gz file"),
        ("folder", b"", "is a folder without Parquet files"),
        ("./folder", b"", "is a folder without Parquet files"),
        ("no-such/data-set", None, "neither a file here nor a data set that can be loaded"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    if content is not None and "folder" not in name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"data source {name}.*{message}"):
        list(read_rows(name))


def test_a_csv_row_with_missing_fields_is_bad(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen\na,b\nc\nd,e,f\n")
    skipped = []
    assert [row for row, _ in read_rows(str(path), on_bad=skipped.append)] == [{"prompt": "a", "chosen": "b"}]
    assert [str(error).split(": ")[1].split(";")[0] for error in skipped] == ["expected as many fields as the header has"] * 2


def test_on_bad_row_has_two_values():
    with pytest.raises(ValueError, match=r"data.on_bad_row='ignore' is not known; use error or skip"):
        bad_row_handler("ignore", [])
