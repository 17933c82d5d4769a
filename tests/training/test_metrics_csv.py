"""metrics.csv: read back with the csv module of Python, also after sessions that were lost."""

import csv
from pathlib import Path

from lora_cli.training.metrics_csv import CsvTracker


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_new_numbers_get_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    tracker = CsvTracker(path, last_step=-1)
    assert path.read_text() == "step\n"
    tracker.log({"eval/loss": 0.5}, 0)
    tracker.log({"train/loss": 0.25, "train/lr": 1e-3}, 1)
    tracker.log({"eval/loss": 0.125}, 1)
    tracker.finish()
    assert rows(path) == [
        {"step": "0", "eval/loss": "0.5", "train/loss": "", "train/lr": ""},
        {"step": "1", "eval/loss": "", "train/loss": "0.25", "train/lr": "0.001"},
        {"step": "1", "eval/loss": "0.125", "train/loss": "", "train/lr": ""},
    ]


def test_a_resumed_run_repeats_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = CsvTracker(path, last_step=-1)
    for step in range(1, 6):
        first.log({"a": step / 2}, step)
    with path.open("a") as file:
        file.write("x,")  # a line that was cut off
    second = CsvTracker(path, last_step=3)
    second.log({"a": 2.0}, 4)
    second.log({"b": 1.0}, 5)
    found = [(row["step"], row["a"], row["b"]) for row in rows(path)]
    assert found == [
        ("1", "0.5", ""),
        ("2", "1.0", ""),
        ("3", "1.5", ""),
        ("4", "2.0", ""),
        ("5", "", "1.0"),
    ]


def test_a_new_run_starts_a_new_table(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    CsvTracker(path, last_step=-1).log({"a": 1.0}, 0)
    CsvTracker(path, last_step=-1)
    assert rows(path) == []
