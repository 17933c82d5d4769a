"""Rows with an image and captions."""

from typing import Any

import pytest

from lora_cli.config.tasks import DataConfig
from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row
from lora_cli.tasks.captions import by_caption, image_key, without_purpose


def loaded(*values: dict[str, Any]) -> Any:
    rows = tuple(Row(str(n), value, "rows.jsonl", n) for n, value in enumerate(values, start=1))
    return Loaded(rows={"train": rows}, class_names={}, notes=())


def test_a_list_of_captions_becomes_a_row_each() -> None:
    found = by_caption(
        DataConfig(),
        loaded(
            {"image": "a.png", "Captions": ["one", "two"]}, {"image": "b.png", "Captions": "three"}
        ),
    )
    rows = found.rows["train"]
    assert [(row.id, row.values["Captions"]) for row in rows] == [
        ("1#1", "one"),
        ("1#2", "two"),
        ("2", "three"),
    ]
    assert [row.number for row in rows] == [1, 1, 2]


def test_an_empty_list_is_a_missing_caption() -> None:
    (row,) = by_caption(DataConfig(), loaded({"caption": []})).rows["train"]
    assert row.values["caption"] is None


def test_only_the_column_that_is_named_is_read() -> None:
    data = DataConfig(caption_column="text")
    (row,) = by_caption(data, loaded({"caption": ["a", "b"], "text": "c"})).rows["train"]
    assert row.values == {"caption": ["a", "b"], "text": "c"}
    (row,) = by_caption(DataConfig(), loaded({"image": "a.png"})).rows["train"]
    assert row.values == {"image": "a.png"}


def test_rows_of_one_file_or_cell_have_one_image() -> None:
    file = {"path": "a.png", "file": "/x/a.png", "size": 3, "modified": 1}
    assert image_key(file) == image_key({**file, "path": "../x/a.png"})
    cell = {"path": "a.png", "table": "t.arrow", "column": "image", "row": 1, "modified": 1}
    assert image_key(cell) != image_key({**cell, "row": 2})


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"caption": "text", "label": None}, []),
        ({"caption": None, "label": None}, ["data.nothing-to-compare"]),
        ({"caption": "text", "label": "kind"}, ["data.no-zero-shot"]),
        ({"caption": None, "label": "kind"}, ["data.no-zero-shot"]),
    ],
)
def test_rows_must_have_a_purpose(columns: Any, found: list[str]) -> None:
    assert [problem.id for problem in without_purpose(columns)] == found
