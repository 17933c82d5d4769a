import csv
import io
import json
import os
import random
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_cli.data.files import WORD_LAYOUTS, iter_rows, read_file, resolve_layout, with_own_ids
from lora_cli.data.types import Row
from lora_cli.errors import UserError

ROWS = [
    {"text": "plain", "label": "a"},
    {"text": 'commas, "quotes" and\na break', "label": "b"},
    {"text": "שלום 👩‍👩‍👧 你好 \u202e rtl", "label": "c"},
    {"text": "  spaces \t tab ", "label": "ü"},
]


def write(path, rows):
    layout = path.suffix[1:]
    if layout == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif layout == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif layout in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if layout == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif layout == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return path


def problem_of(path, content):
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_file(path, name=path.name)
    return caught.value.problems[0]


@pytest.mark.parametrize("layout", ["jsonl", "json", "csv", "tsv", "parquet", "arrow"])
def test_every_layout_gives_the_same_rows(tmp_path, layout):
    rows = read_file(write(tmp_path / f"rows.{layout}", ROWS), name="rows")
    assert [dict(row.values) for row in rows] == ROWS
    assert [row.number for row in rows] == [1, 2, 3, 4]
    assert [row.id for row in rows] == ["1", "2", "3", "4"]
    assert rows[2].where == "rows row 3"


def test_arrow_file_format_is_read_as_well(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    path = tmp_path / "rows.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert [dict(row.values) for row in read_file(path)] == ROWS


@pytest.mark.parametrize("layout", ["jsonl", "json", "csv", "tsv"])
def test_bom_and_crlf_change_nothing(tmp_path, layout):
    rows = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]
    path = write(tmp_path / f"rows.{layout}", rows)
    content = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + content)
    assert [dict(row.values) for row in read_file(path)] == rows


JSON_FAULTS = {
    "cut": (b'{"text": "a"}\n{"text": "b', "not valid JSON"),
    "text": (b'{"text": "a"}\n"b"\n', "is a text"),
    "list": (b'{"text": "a"}\n[1]\n', "is a list"),
    "null": (b'{"text": "a"}\nnull\n', "is null"),
    "number": (b'{"text": "a"}\n7\n', "is a number"),
    "true": (b'{"text": "a"}\ntrue\n', "is true or false"),
    "latin1": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "byte 0xe9"),
    "nul": (b'{"text": "a"}\n{"text": "b\0"}\n', "NUL"),
    "escaped nul": (b'{"text": "a"}\n{"text": "b\\u0000"}\n', "NUL"),
    "lone surrogate": (b'{"text": "a"}\n{"text": ["b\\ud83d"]}\n', "lone surrogate"),
    "surrogate in a name": (b'{"text": "a"}\n{"\\udc00": 1}\n', "lone surrogate"),
    "same key twice": (b'{"text": "a"}\n{"text": "b", "text": "c"}\n', '"text" twice'),
    "nan": (b'{"text": "a"}\n{"text": "b", "x": NaN}\n', "NaN"),
    "deep": (b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", "nested too deeply"),
    "huge number": (b'{"text": "a"}\n{"x": ' + b"9" * 5000 + b"}\n", "4300"),
    "utf-16": ('{"text": "a"}\n'.encode("utf-16"), "byte 0xff"),
    "gzip": (b'{"text": "a"}\n\x1f\x8b\x08\x00\x00', "byte 0x8b"),
}


@pytest.mark.parametrize("name", sorted(JSON_FAULTS))
def test_jsonl_faults_name_file_and_row(tmp_path, name):
    content, finding = JSON_FAULTS[name]
    problem = problem_of(tmp_path / "train.jsonl", content)
    row = 1 if name == "utf-16" else 2
    assert problem.id == "data.bad-row"
    assert problem.where == f"train.jsonl row {row}"
    assert finding in problem.message
    assert problem.message.startswith("`train.jsonl` must ")
    assert problem.fix


def test_json_error_names_the_column(tmp_path):
    problem = problem_of(tmp_path / "a.jsonl", b'{"text": "a" "label": 1}')
    assert "column 14" in problem.message


def test_surrogate_pairs_and_escapes_are_fine(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\ude00 \\u00e9 \\\\ud83d"}')
    assert read_file(path)[0].values["text"] == "😀 é \\ud83d"


def test_blank_lines_keep_line_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": 2}\n')
    assert [row.number for row in read_file(path)] == [1, 4]


def test_json_lines_called_json_are_explained(tmp_path):
    problem = problem_of(tmp_path / "a.json", b'{"a": 1}\n{"a": 2}\n')
    assert "rename the file to .jsonl" in problem.fix
    assert "one JSON list" in problem_of(tmp_path / "a.json", b'{"a": 1}').message
    assert problem_of(tmp_path / "a.json", b'[{"a": 1}, 3]').where == "a.json row 2"


CSV_FAULTS = {
    "few values": (b"text,label\na,1\nb\n", "row 2", "1 values for 2 columns"),
    "many values": (b"text,label\na,1\nb,2,3\n", "row 2", "3 values for 2 columns"),
    "open quote": (b'text,label\na,1\n"b,2\nc,3\n', "row 2", "unexpected end of data"),
    "stray quote": (b'text,label\na,1\n"b" x,2\n', "row 2", "expected after"),
    "latin1": (b"text,label\na,1\ncaf\xe9,2\n", "row 2", "byte 0xe9"),
    "nul": (b"text,label\na,1\nb\0,2\n", "row 2", "NUL"),
    "same name twice": (b"text,text\na,b\n", None, 'two columns called "text"'),
    "no name": (b"text,\na,b\n", None, "no name for column 2"),
}


@pytest.mark.parametrize("name", sorted(CSV_FAULTS))
def test_csv_faults_name_file_and_row(tmp_path, name):
    content, row, finding = CSV_FAULTS[name]
    problem = problem_of(tmp_path / "a.csv", content)
    assert problem.where == ("a.csv" if row is None else f"a.csv {row}")
    assert finding in problem.message


def test_csv_rows_are_counted_as_records_not_lines(tmp_path):
    content = b'text,label\n"a\nb\nc",1\n\nd\n'
    problem = problem_of(tmp_path / "a.csv", content)
    assert problem.where == "a.csv row 2"


def test_large_csv_values_are_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "x" * 10_000_000 + ",1\n")
    assert len(read_file(path)[0].values["text"]) == 10_000_000


@pytest.mark.parametrize("layout", ["jsonl", "json", "csv", "tsv", "parquet", "arrow"])
def test_files_without_rows_and_garbage_are_refused(tmp_path, layout):
    random.seed(0)
    for content in (b"", random.randbytes(500)):
        problem = problem_of(tmp_path / f"a.{layout}", content)
        assert problem.id in ("data.no-rows", "data.bad-file", "data.bad-row")
        assert problem.where.startswith(f"a.{layout}")
    if layout not in ("parquet", "arrow"):
        assert problem_of(tmp_path / f"a.{layout}", b"").id == "data.no-rows"


def test_header_alone_is_no_row(tmp_path):
    assert problem_of(tmp_path / "a.csv", b"text,label\n").id == "data.no-rows"
    assert problem_of(tmp_path / "a.json", b"[]").id == "data.no-rows"


def test_cut_parquet_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", ROWS)
    content = path.read_bytes()
    assert problem_of(path, content[: len(content) // 2]).id == "data.bad-file"


@pytest.mark.parametrize("name", ["a.py", "a.pkl", "a.zip", "a.jsonl.gz", "a.xlsx", "a", "a.txt"])
def test_other_extensions_are_never_read(tmp_path, name):
    problem = problem_of(tmp_path / name, b'{"text": "a"}\n')
    assert problem.id == "data.unknown-format"
    assert ".jsonl" in problem.allowed


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    found = {}
    for name in ("folder", "pipe", "loop", "none"):
        with pytest.raises(UserError) as caught:
            read_file(tmp_path / f"{name}.jsonl")
        found[name] = caught.value.problems[0].id
    assert found == {
        "folder": "data.not-a-file",
        "pipe": "data.not-a-file",
        "loop": "data.unreadable",
        "none": "data.no-such-file",
    }


def test_own_ids_are_used_only_if_unique():
    def ids(*values):
        rows = tuple(Row(str(n), {"id": v}, "f", n) for n, v in enumerate(values, start=1))
        return [row.id for row in with_own_ids(rows)]

    assert ids("x", "y") == ["x", "y"]
    assert ids(10, 20) == ["10", "20"]
    assert ids("x", "x") == ["1", "2"]
    assert ids("x", None) == ["1", "2"]
    assert ids(0, "0") == ["1", "2"]
    assert ids(True, "y") == ["1", "2"]


def test_streams_are_read_row_by_row():
    def lines():
        yield b'{"text": "a"}\n'
        yield b'{"text": "b"}\n'
        raise AssertionError("read ahead")

    rows = iter_rows(lines(), layout="jsonl")
    assert next(rows).values == {"text": "a"}
    assert next(rows).id == "2"


def test_streams_of_text_and_bad_layouts():
    rows = list(iter_rows(io.BytesIO("één\r\n\nzwei, drei\n".encode()), layout="txt"))
    assert [(row.id, row.values["text"]) for row in rows] == [("1", "één"), ("3", "zwei, drei")]
    assert rows[0].where == "standard input row 1"
    with pytest.raises(UserError) as caught:
        iter_rows(io.BytesIO(b""), layout="parquet")
    assert caught.value.problems[0].id == "data.not-a-stream"


def test_files_to_predict_may_be_txt(tmp_path):
    (tmp_path / "a.txt").write_text("hello\n")
    assert [row.values for row in iter_rows(tmp_path / "a.txt")] == [{"text": "hello"}]
    assert resolve_layout(tmp_path / "A.JSONL") == "jsonl"


def test_100k_rows_take_about_a_second(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "a few words of a usual row " * 3, "label": "a"}) + "\n"
    path.write_text(line * 100_000)
    start = time.process_time()
    assert len(read_file(path)) == 100_000
    assert time.process_time() - start < 3


def words_of(path, text):
    path.write_text(text)
    return [dict(row.values) for row in read_file(path, layouts=WORD_LAYOUTS)]


@pytest.mark.parametrize("name", ["d.conll", "d.txt", "d.tsv", "d.TXT"])
def test_words_a_line_are_read_by_any_usual_ending(tmp_path, name):
    rows = words_of(tmp_path / name, "New\tB-LOC\nYork\tI-LOC\n\nyes\tO\n")
    assert rows == [
        {"tokens": ["New", "York"], "tags": ["B-LOC", "I-LOC"]},
        {"tokens": ["yes"], "tags": ["O"]},
    ]


@pytest.mark.parametrize("gap", ["", "\n"])
def test_a_tsv_table_of_words_stays_one(tmp_path, gap):
    rows = words_of(tmp_path / "d.tsv", f"tokens\ttags\nNew York\tB I\n{gap}yes\tO\n")
    assert rows == [{"tokens": "New York", "tags": "B I"}, {"tokens": "yes", "tags": "O"}]


def test_other_families_do_not_read_words_a_line(tmp_path):
    problem = problem_of(tmp_path / "d.conll", b"New O\n")
    assert problem.id == "data.unknown-format"
    rows = tmp_path / "d.tsv"
    rows.write_text("text\tlabel\na\tx\n\nb\ty\n")
    assert len(read_file(rows)) == 2


def test_a_line_that_does_not_fit_is_named_with_its_file(tmp_path):
    path = tmp_path / "d.conll"
    path.write_text("a O\n\nb O\nc\n")
    with pytest.raises(UserError) as caught:
        read_file(path, name="d.conll", layouts=WORD_LAYOUTS)
    (problem,) = caught.value.problems
    assert problem.where == "d.conll row 3"
    assert "(line 4)" in problem.message
