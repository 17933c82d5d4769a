"""`lora-cli predict`: layouts, order, own columns, and what a bad row leaves behind."""

import csv
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest

TEXTS = ["a good film", "dull, boring", 'it\'s "fine"', "the plot was very weak and the end", "x"]


def predict(run_cli: Any, run: Any, *arguments: object, stdin: bytes = b"") -> list[Any]:
    finished = run_cli("predict", "runs/a", *arguments, cwd=run.cwd, stdin=stdin)
    assert finished.code == 0, finished.err
    return list(finished.lines)


def jsonl(texts: list[Any], **columns: Any) -> bytes:
    return "".join(json.dumps({"text": text, **columns}) + "\n" for text in texts).encode()


@pytest.fixture(scope="module")
def expected(run_cli: Any, tiny_run: Any) -> list[dict[str, float]]:
    """The probabilities of each text alone."""
    return [predict(run_cli, tiny_run, f"text={text}")[0]["probabilities"] for text in TEXTS]


def assert_same(lines: list[Any], expected: list[dict[str, float]]) -> None:
    assert [line["text"] for line in lines] == TEXTS
    for line, probabilities in zip(lines, expected, strict=True):
        assert line["probabilities"] == pytest.approx(probabilities, abs=1e-6)
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-6)
        assert line["label"] == max(probabilities, key=lambda name: probabilities[name])


def write(path: Path) -> None:
    delimiter = {".csv": ",", ".tsv": "\t"}.get(path.suffix)
    if delimiter:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([["text"], *([text] for text in TEXTS)])
    elif path.suffix == ".txt":
        path.write_text("\n".join(TEXTS) + "\n")
    else:
        path.write_bytes(jsonl(TEXTS))


@pytest.mark.parametrize("layout", ["jsonl", "csv", "tsv", "txt"])
@pytest.mark.parametrize("source", ["file", "stdin", "odd name"])
def test_every_layout_says_the_same(
    run_cli: Any, tiny_run: Any, tmp_path: Path, expected: Any, layout: str, source: str
) -> None:
    path = tmp_path / f"it's, data (1)=x.{layout}"
    write(path)
    if source == "stdin":
        lines = predict(run_cli, tiny_run, f"format={layout}", stdin=path.read_bytes())
    elif source == "file":
        lines = predict(run_cli, tiny_run, f"input={path}")
    else:
        path = path.rename(tmp_path / "rows")
        lines = predict(run_cli, tiny_run, f"input={path}", f"format={layout}")
    assert_same(lines, expected)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_batch_size_changes_nothing(
    run_cli: Any, tiny_run: Any, expected: Any, batch_size: int
) -> None:
    lines = predict(run_cli, tiny_run, f"batch_size={batch_size}", stdin=jsonl(TEXTS))
    assert_same(lines, expected)
    assert [line["id"] for line in lines] == ["1", "2", "3", "4", "5"]


def test_own_columns_are_kept(run_cli: Any, tiny_run: Any) -> None:
    rows = [
        {"id": "r7", "text": "a good film", "label": "?", "stars": 3, "tags": ["ä"]},
        {"id": 8, "text": "dull", "label": None, "probabilities": "mine"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    lines = predict(run_cli, tiny_run, stdin=text)
    assert [line["id"] for line in lines] == ["r7", 8]
    assert lines[0]["stars"] == 3
    assert lines[0]["tags"] == ["ä"]
    assert [line["input_label"] for line in lines] == ["?", None]
    assert lines[1]["input_probabilities"] == "mine"
    assert {line["label"] for line in lines} <= {"negative", "positive"}
    assert all("reference" not in line for line in lines)


def test_own_values_that_json_lacks_are_written_as_texts(
    run_cli: Any, tiny_run: Any, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {"text": "a good film", "day": date(2024, 1, 31), "price": float("nan"), "raw": b"a"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    finished = run_cli("predict", "runs/a", f"input={tmp_path}/rows.parquet", cwd=tiny_run.cwd)
    assert finished.code == 0, finished.err
    assert "NaN" not in finished.out
    (line,) = finished.lines
    assert (line["day"], line["price"], line["raw"]) == ("2024-01-31", None, "YQ==")


def test_a_text_that_is_no_utf8_is_refused(run_cli: Any, tiny_run: Any) -> None:
    text = os.fsdecode(b"text=caf\xe9")
    finished = run_cli("predict", "runs/a", text, cwd=tiny_run.cwd)
    assert finished.code == 2
    assert "error[predict.bad-text]: `text` must be UTF-8 text, but is not at character 4" in (
        finished.err
    )


def test_texts_mean_what_they_say(run_cli: Any, tiny_run: Any) -> None:
    for text in ("a, b, c", "it's (fine)", "key=value", "${seed}", "a: [b] {c}", "nullify", " é "):
        (line,) = predict(run_cli, tiny_run, f"text={text}")
        assert line["text"] == text


@pytest.mark.parametrize(
    ("row", "finding"),
    [
        ('{"text": null}', "null"),
        ('{"text": "  "}', "empty"),
        ('{"text": 3}', "number"),
        ('{"other": "x"}', "missing"),
        ('{"text": "x"', "not valid JSON"),
        ('["text"]', "a list"),
    ],
)
@pytest.mark.parametrize("batch_size", [2, 64])
def test_a_bad_row_ends_the_run_after_the_rows_before_it(
    run_cli: Any, tiny_run: Any, tmp_path: Path, row: str, finding: str, batch_size: int
) -> None:
    path, output = tmp_path / "x.jsonl", tmp_path / "out.jsonl"
    path.write_text(jsonl(TEXTS[:3]).decode() + row + "\n" + jsonl(TEXTS[3:]).decode())
    arguments = (f"input={path}", f"output={output}", f"batch_size={batch_size}")
    finished = run_cli("predict", "runs/a", *arguments, cwd=tiny_run.cwd)
    assert finished.code == 1
    assert finished.out == ""
    assert f"{path} row 4" in finished.err
    assert finding in finished.err
    assert "only the first 3 were" in finished.err
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == TEXTS[:3]


@pytest.mark.parametrize(
    ("content", "expected_id"),
    [
        (b'{"text": null}\n', "data.bad-text"),
        (b"not json\n", "data.bad-row"),
        (b'{"body_": "x"}\n', "data.missing-column"),
        (b"", "predict.no-rows"),
        (b"\n\n", "predict.no-rows"),
    ],
)
def test_a_bad_start_writes_nothing(
    run_cli: Any, tiny_run: Any, tmp_path: Path, content: bytes, expected_id: str
) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    finished = run_cli(
        *("predict", tiny_run.path, "input=x.jsonl", "output=out/p.jsonl"), cwd=tmp_path
    )
    assert finished.code == 2
    assert f"error[{expected_id}]" in finished.err
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_another_usual_column_is_taken(run_cli: Any, tiny_run: Any, expected: Any) -> None:
    (line,) = predict(run_cli, tiny_run, stdin=b'{"sentence": "a good film", "n": 1}\n')
    assert line["probabilities"] == pytest.approx(expected[0], abs=1e-6)


def test_output_files_are_not_overwritten_by_accident(
    run_cli: Any, tiny_run: Any, tmp_path: Path
) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_bytes(jsonl(TEXTS))
    output.write_text("mine")
    arguments = ("predict", tiny_run.path, "input=rows.jsonl")
    assert run_cli(*arguments, "output=out.jsonl", cwd=tmp_path).code == 2
    assert output.read_text() == "mine"
    done = run_cli(*arguments, "output=out.jsonl", "--overwrite", "--json", cwd=tmp_path)
    assert done.code == 0
    assert done.lines == [{"predictions": 5, "output": "out.jsonl"}]
    assert len(output.read_text().splitlines()) == 5
    for flags in ([], ["--overwrite"]):
        refused = run_cli(*arguments, "output=./rows.jsonl", *flags, cwd=tmp_path)
        assert refused.code == 2
        assert "what the command reads" in refused.err
        assert rows.read_bytes() == jsonl(TEXTS)
        assert run_cli(*arguments, f"output={tmp_path}", *flags, cwd=tmp_path).code == 2


def test_a_new_process_says_the_same_bit_for_bit(tiny_run: Any, run_cli: Any) -> None:
    """The base lacks pooler and classifier: both must come from the adapter, not from chance."""
    lines = (tiny_run.data / "test.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines[:8]]
    command = [sys.executable, "-m", "lora_cli", "predict", "runs/a", "--quiet"]
    done = subprocess.run(
        command, input=jsonl(texts), cwd=tiny_run.cwd, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    here = run_cli("predict", "runs/a", cwd=tiny_run.cwd, stdin=jsonl(texts))
    assert done.stdout.decode() == here.out
    assert done.stderr == b""


def test_a_wrong_run_is_refused_before_the_rows_are_waited_for(
    run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("standard input was read")

    monkeypatch.setattr("lora_cli.commands.predict._rows", fail)
    for run in ("nosuch", f"from={'x' * 300}"):
        finished = run_cli("predict", run, cwd=tmp_path, stdin=b"")
        assert finished.code == 2, finished.err
        assert "error[adapter.not-found]" in finished.err
