from lora_cli.data.repeats import repeat_notes, repeated_rows
from lora_cli.data.types import Row


def texts(*values: str) -> tuple[Row, ...]:
    return tuple(Row(str(n), {"t": v, "u": "x"}, "f", n) for n, v in enumerate(values))


SPLITS = {
    "train": texts("Hello  World", "ﬁne", "other"),
    "validation": texts(" hello world\n", "hello worlds", "FINE"),
    "test": texts("nothing"),
}


def test_planted_repeats_are_found_exactly() -> None:
    found = repeated_rows(SPLITS, ["t"])
    assert found == {"validation": frozenset({"0", "2"})}
    (note,) = repeat_notes(SPLITS, found)
    assert note.startswith("warning: validation: 2 of 3 rows have the text of a row of train")


def test_all_columns_must_be_equal() -> None:
    other = {**SPLITS, "train": tuple(Row("9", {"t": "fine", "u": "y"}, "f", 9) for _ in "a")}
    assert repeated_rows(other, ["t", "u"]) == {}
    assert repeated_rows(other, ["t"]) == {"validation": frozenset({"2"})}
