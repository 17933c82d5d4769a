"""Tables, model card and report hold the numbers that they are given, in the right place."""

import json
from typing import Any

import pytest

from lora_cli.commands.opening import open_adapter
from lora_cli.commands.reporting import card_data, report_data, show_comparison, show_report


class Tables:
    def __init__(self) -> None:
        self.shown: list[tuple[Any, ...]] = []

    def table(self, *parts: Any) -> None:
        self.shown.append(parts)


def test_the_models_stand_in_order_whatever_the_mapping() -> None:
    display: Any = Tables()
    metrics = {
        "merged": {"accuracy": 0.75, "loss": 0.5},
        "base": {"accuracy": 0.25},
        "adapter": {"accuracy": 0.75, "loss": 0.5},
    }
    sizes = {"base": 10**6, "adapter": 50_000, "merged": 2 * 10**6}
    show_comparison(display, "test", 1234, metrics, sizes=sizes)
    show_comparison(display, "test", 5, {"base": {"accuracy": 1.0}})
    assert display.shown == [
        (
            "test (1,234 rows)",
            ["model", "accuracy", "loss", "size on disk"],
            [
                ["base", "0.2500", "", "1.0 MB"],
                ["adapter", "0.7500", "0.5000", "0.1 MB"],
                ["merged", "0.7500", "0.5000", "2.0 MB"],
            ],
        ),
        ("test (5 rows)", ["model", "accuracy"], [["base", "1.0000"]]),
    ]


def test_many_metrics_stand_below_each_other() -> None:
    display: Any = Tables()
    names = [f"m{number}" for number in range(7)]
    metrics = {
        "base": dict.fromkeys(names, 0.5),
        "adapter": dict.fromkeys(names, 0.75),
        "merged": None,
    }
    show_comparison(display, "test", 9, metrics, sizes={"adapter": 2_000_000})
    [(_, columns, rows)] = display.shown
    assert columns == ["metric", "base", "adapter", "merged: cannot be"]
    assert rows[0] == ["m0", "0.5000", "0.7500", ""]
    assert rows[-1] == ["size on disk", "", "2.0 MB", ""]


def test_scores_by_class() -> None:
    display: Any = Tables()
    line = {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "support": 1500}
    report = {"labels": ["a"], "classes": [line], "macro": line, "weighted": line}
    show_report(display, report)
    ((_, columns, rows),) = display.shown
    assert columns == ["class", "precision", "recall", "f1", "rows"]
    assert rows[0] == ["a", "0.5000", "0.2500", "0.3333", "1,500"]
    assert [row[0] for row in rows] == ["a", "macro average", "weighted average"]


@pytest.fixture(scope="module")
def opened(tiny_run: Any) -> Any:
    return open_adapter(str(tiny_run.path), base=None)


def test_the_card_says_what_was_measured(tiny_run: Any, opened: Any) -> None:
    card = card_data(opened.config, opened.record, opened.adapter, name="a")
    result = json.loads((tiny_run.path / "result.json").read_text())
    assert card.before == result["base"]
    assert card.after == result["adapter"]
    assert (card.split, card.rows) == ("validation", 32)
    assert card.labels == ("negative", "positive")
    assert (
        card.base_sha256
        == json.loads((tiny_run.path / "environment.json").read_text())["base"]["sha256"]
    )
    assert card.lora["lora.r"] == "4"
    assert card.training["length"] == "4 steps"
    text = (tiny_run.path / "adapter" / "README.md").read_text()
    assert f"{result['adapter']['accuracy']:.4f}" in text


def test_the_report_has_the_curves_of_the_run(tiny_run: Any, opened: Any) -> None:
    result = json.loads((tiny_run.path / "result.json").read_text())
    line = {"precision": 0.5, "recall": 0.25, "f1": 0.3, "support": 16}
    details = {
        "labels": ["negative", "positive"],
        "classes": [line, line],
        "confusion": [[8, 8], [4, 12]],
        "macro": line,
        "weighted": line,
    }
    report = report_data(
        tiny_run.path,
        opened.config,
        result=result,
        details=details,
        rows=32,
        notes=["n"],
        data=[("Data", ["split"], [["train"]])],
    )
    lines = [
        json.loads(text) for text in (tiny_run.path / "metrics.jsonl").read_text().splitlines()
    ]
    train = [entry for entry in lines if entry["event"] == "train"]
    assert report.losses == [(entry["step"], entry["loss"]) for entry in train]
    assert report.learning_rates == [(entry["step"], entry["lr"]) for entry in train]
    assert [step for step, _ in report.evaluations] == [0, 2, 4]
    assert report.rows == 32
    assert set(report.metrics) == {"base", "adapter", "merged"}
    assert report.confusion == [[8, 8], [4, 12]]
    assert report.settings["lora.targets"] == "query, value"
