import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_cli.commands.data_report import (
    describe_rows,
    report_tables,
    show_rows,
    without_repeated,
)
from lora_cli.data.types import Row, Splits
from lora_cli.errors import UserError
from lora_cli.tasks.single_label import LabelPrediction
from lora_cli.tasks.table import FAMILIES
from lora_cli.training.evaluation import Evaluation

STATE = {"labels": ["bad", "good"], "columns": {"label": "y"}, "numbered": False}
LENGTHS = {"train": [3, 5, 9, 9], "validation": [4, 4]}
CUT = {"train": [0, 0, 1, 3], "validation": [0, 0]}
LABELS = {"train": ["good", "good", "bad", "good"], "validation": ["bad", "bad"]}


class Shown:
    """A display that keeps tables and notes."""

    def __init__(self) -> None:
        self.tables: list[tuple[str, Any, Any]] = []

    def table(self, title: str, columns: Any, rows: Any, *, is_result: bool) -> None:
        assert not is_result
        self.tables.append((title, columns, rows))


def splits(labels: dict[str, list[str]]) -> Splits:
    rows = {
        split: tuple(Row(str(n), {"y": y}, split, n) for n, y in enumerate(values))
        for split, values in labels.items()
    }
    return Splits(rows, STATE, repeated={"validation": frozenset({"1"})})


def features(supervised: int = 1) -> dict[str, list[dict[str, int]]]:
    return {
        split: [
            {"length": length, "cut": cut, "supervised": supervised}
            for length, cut in zip(LENGTHS[split], CUT[split], strict=True)
        ]
        for split in LENGTHS
    }


def test_the_counts_are_those_of_numpy() -> None:
    report = describe_rows(FAMILIES["text_classification"], splits(LABELS), features(2))
    train = report["train"]
    assert train["tokens"] == {
        "mean": 6.5,
        "median": 7.0,
        "p95": np.percentile(LENGTHS["train"], 95),
        "most": 9,
    }
    assert (train["cut_rows"], train["cut_tokens"]) == (0.5, 4 / 30)
    assert (train["supervised"], train["repeated"]) == (2.0, 0)
    assert train["labels"] == {"bad": 1, "good": 3}
    assert report["validation"]["repeated"] == 1
    assert json.loads(json.dumps(report)) == report


def test_the_most_frequent_label_comes_first() -> None:
    report = describe_rows(FAMILIES["text_classification"], splits(LABELS), features())
    (_, _, rows), (title, columns, labels) = report_tables(report)
    assert rows[0][:5] == ["train", "4", "6.5", "9", "9"]
    assert (title, columns) == ("Labels in the data", ["label", "train", "validation"])
    assert labels == [["good", "3 (75.0 %)", "0 (0.0 %)"], ["bad", "1 (25.0 %)", "2 (100.0 %)"]]


def test_many_labels_are_cut_on_the_terminal_alone() -> None:
    names = [f"label {n:02}" for n in range(20)]
    many = {
        "train": {"rows": 20, "tokens": {"mean": 1.0, "p95": 1.0, "most": 1}, "cut_rows": 0.0}
        | {"cut_tokens": 0.0, "supervised": 1.0, "labels": dict.fromkeys(names, 1)}
    }
    display: Any = Shown()
    show_rows(display, many)
    assert display.tables[1][0] == "Labels in the data: the first 12 of 20"
    assert [row[0] for row in display.tables[1][2]] == names[:12]
    assert len(report_tables(many)[1][2]) == 20


def test_nothing_to_learn_from_is_an_error() -> None:
    with pytest.raises(UserError, match="none of its 4 encoded rows has"):
        describe_rows(FAMILIES["text_classification"], splits(LABELS), features(0))


def test_metrics_without_the_rows_that_train_has() -> None:
    task = FAMILIES["text_classification"].build(
        type("Config", (), {"metric": "accuracy", "max_length": 8}), STATE, None
    )
    rows = [LabelPrediction(str(n), n % 2, (0.5, 0.5), 1) for n in range(4)]
    evaluation = Evaluation(tuple(rows), 0.0)
    found = without_repeated(task, evaluation, frozenset({"0", "1", "2"}))
    assert found is not None
    assert (found["rows"], found["accuracy"]) == (1, 1.0)
    assert without_repeated(task, evaluation, frozenset({"9"})) is None


def test_a_run_shows_and_keeps_them(tiny_run: Any, run_cli: Any, tmp_path: Path) -> None:
    data = tmp_path / "rows"
    data.mkdir()
    lines = (tiny_run.data / "train.jsonl").read_text().splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join(lines))
    (data / "validation.jsonl").write_text(
        "".join(lines[:3]) + (tiny_run.data / "validation.jsonl").read_text()
    )
    settings = [s for s in tiny_run.settings if not s.startswith("task.data.path")]
    done = run_cli(
        "train", *settings, f"task.data.path={data}", f"run.dir={tmp_path / 'a'}", cwd=tmp_path
    )
    assert done.code == 0, done.err
    assert "Labels in the data" in done.err
    assert "validation: 3 of 35 rows have the text of a row of train" in done.err
    report = json.loads((tmp_path / "a" / "data_report.json").read_text())
    assert report["validation"]["repeated"] == 3
    assert report["train"]["labels"] == {"negative": 32, "positive": 32}
    assert "Labels in the data" in (tmp_path / "a" / "report.html").read_text()
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["without_repeated"]["rows"] == 32
    done = run_cli("eval", tmp_path / "a", "split=validation", "--json", cwd=tmp_path)
    assert done.lines[0]["without_repeated"] == pytest.approx(result["without_repeated"], abs=1e-5)
