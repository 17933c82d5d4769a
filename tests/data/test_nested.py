from lora_cli.data.nested import flat_row, flat_rows
from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row


def test_languages_become_columns() -> None:
    row = Row("7", {"id": 1, "translation": {"en": "a", "de": "b"}, "x": [2]}, "f", 3)
    flat = flat_row(row)
    assert flat == Row(
        "7", {"id": 1, "translation.en": "a", "translation.de": "b", "x": [2]}, "f", 3
    )
    assert flat_row(flat) is flat


def test_a_column_of_that_name_stays() -> None:
    row = Row("1", {"a": {"b": 1, "c": 2}, "a.b": 3}, "f", 1)
    assert flat_row(row).values == {"a.c": 2, "a.b": 3}


def test_all_splits() -> None:
    row = Row("1", {"a": {"b": 1}}, "f", 1)
    found = flat_rows(Loaded({"train": (row,), "test": (row, row)}, {"x": ("y",)}, ("z",)))
    assert {split: [one.values for one in rows] for split, rows in found.rows.items()} == {
        "train": [{"a.b": 1}],
        "test": [{"a.b": 1}] * 2,
    }
    assert (found.class_names, found.notes) == ({"x": ("y",)}, ("z",))
