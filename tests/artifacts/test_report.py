"""The HTML report, read back by an HTML parser."""

import dataclasses
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lora_cli.artifacts.report import ReportData, render_report, write_report

REPORT = ReportData(
    name="first",
    settings={"lora.r": "8", "task.data.path": "reviews"},
    split="test",
    rows=20,
    metrics={
        "base": {"accuracy": 0.5, "loss": 0.7},
        "adapter": {"accuracy": 0.9, "loss": 0.25},
        "merged": {"accuracy": 0.9},
    },
    losses=[(10, 0.7), (20, 0.4), (30, 0.3)],
    learning_rates=[(10, 1e-3), (20, 5e-4), (30, 0.0)],
    metric="accuracy",
    evaluations=[(0, 0.5), (30, 0.9)],
    labels=("bad", "good"),
    confusion=[[9, 1], [2, 8]],
    classes=[
        {"precision": 9 / 11, "recall": 0.9, "f1": 6 / 7, "support": 10},
        {"precision": 8 / 9, "recall": 0.8, "f1": 16 / 19, "support": 10},
    ],
    averages={"macro": {"precision": 0.85, "recall": 0.85, "f1": 0.85, "support": 20}},
    notes=("Cut 0.1 of train.",),
)
VOID = {"meta", "br", "path", "circle"}


class Page(HTMLParser):
    """Tags, tables as lists of rows of text, and all text; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tables: list[list[list[str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def test_tables_hold_the_numbers() -> None:
    before_after, matrix, labels, settings = Page(render_report(REPORT)).tables
    assert before_after == [
        ["metric", "base", "adapter", "merged"],
        ["accuracy", "0.5000", "0.9000", "0.9000"],
        ["loss", "0.7000", "0.2500", ""],
    ]
    assert matrix == [["", "bad", "good"], ["bad", "9", "1"], ["good", "2", "8"]]
    assert labels == [
        ["label", "precision", "recall", "F1", "rows"],
        ["bad", "0.818", "0.900", "0.857", "10"],
        ["good", "0.889", "0.800", "0.842", "10"],
        ["macro average", "0.850", "0.850", "0.850", "20"],
    ]
    assert settings == [["lora.r", "8"], ["task.data.path", "reviews"]]


def test_three_charts_and_the_notes() -> None:
    page = Page(render_report(REPORT))
    assert page.tags.count("svg") == 3
    assert {"Training loss", "Validation: accuracy", "Learning rate"} <= set(page.words)
    assert "Cut 0.1 of train." in page.words


def test_nothing_is_fetched_or_run() -> None:
    page = Page(render_report(REPORT))
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(page.tags)
    assert not {"src", "href", "srcset", "onload", "onclick"} & {
        name for name, _ in page.attributes
    }
    assert "url(" not in render_report(REPORT)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in page.attributes
    assert ("name", "viewport") in page.attributes


def with_text(value: Any, text: str) -> Any:
    """Put `text` in the place of every "X"."""
    if isinstance(value, dict):
        return {with_text(key, text): with_text(item, text) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(with_text(item, text) for item in value)
    return text if value == "X" else value


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "X"},
        {"settings": {"X": "X"}},
        {"split": "X"},
        {"metrics": {"X": {"X": 0.5}}},
        {"metric": "X"},
        {"labels": ("X", "b")},
        {"averages": {"X": {"precision": 1, "recall": 1, "f1": 1, "support": 1}}},
        {"notes": ("X",)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_hostile_text_stays_text(changes: dict[str, object]) -> None:
    hostile = "</title></style></td><script>alert(1)</script>\"' onload=x &lt;"
    report = dataclasses.replace(REPORT, **with_text(changes, hostile))
    page = Page(render_report(report))
    assert page.tags.count("style") == 1
    assert "script" not in page.tags
    assert "onload" not in {name for name, _ in page.attributes}
    assert any(hostile in word for word in page.words), "the text itself is shown, whole"


def test_many_labels_show_the_most_confused_pairs() -> None:
    count = 40
    labels = [f"intent {index}" for index in range(count)]
    confusion = [[50 if i == j else 0 for j in range(count)] for i in range(count)]
    confusion[3][7], confusion[9][2], confusion[0][39] = 5, 12, 5
    classes = [{"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 50}] * count
    report = dataclasses.replace(
        REPORT, labels=labels, confusion=confusion, classes=classes, averages={}
    )
    page = Page(render_report(report))
    assert page.tables[1] == [
        ["true", "predicted", "rows"],
        ["intent 9", "intent 2", "12"],
        ["intent 0", "intent 39", "5"],
        ["intent 3", "intent 7", "5"],
    ]
    assert "Most confused labels (3 of 3 pairs)" in page.words


def test_deeper_colour_means_a_larger_share_of_the_row() -> None:
    page = Page(render_report(REPORT))
    depth = [
        float(value.split("/")[1].rstrip(") "))
        for name, value in page.attributes
        if name == "style" and value
    ]
    assert depth == pytest.approx([0.65 * share for share in (0.9, 0.1, 0.2, 0.8)], abs=1e-3)


def test_a_task_without_labels_or_evaluations() -> None:
    report = dataclasses.replace(REPORT, labels=(), confusion=(), classes=(), evaluations=[])
    page = Page(render_report(report))
    assert len(page.tables) == 2
    assert "accuracy: no values" in page.words


def test_write_replaces_the_file_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old" * 100_000)
    write_report(path, dataclasses.replace(REPORT, name="lone \ud800 surrogate, ärger"))
    text = path.read_text(encoding="utf-8")
    assert text.endswith("</html>\n")
    assert "ärger" in text
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_pictures_are_in_the_page_itself() -> None:
    uri = "data:image/png;base64,AAAA"
    report = dataclasses.replace(
        REPORT, pictures=[(uri, 'a"><script>: red, taken for blue (97 %)')]
    )
    page = render_report(report)
    assert f'<img src="{uri}" alt="">' in page
    assert "a&quot;&gt;&lt;script&gt;: red, taken for blue (97 %)" in page
    assert "<script>" not in page
    assert "Wrong, the surest first" not in render_report(REPORT)
