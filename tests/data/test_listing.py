from lora_cli.data.listing import count_rows, list_rows
from lora_cli.data.types import Row

ROWS = [Row(str(n), {}, "d.csv", n) for n in range(1, 13)]


def test_the_first_ten_rows_are_named_and_the_others_counted() -> None:
    first = ", ".join(f"d.csv row {n}" for n in range(1, 11))
    assert list_rows(ROWS[:10]) == first
    assert list_rows(ROWS) == f"{first} and 2 more"


def test_what_was_found_stands_beside_its_row() -> None:
    assert list_rows([(ROWS[0], "null"), (ROWS[1], "")]) == "d.csv row 1 (null), d.csv row 2"


def test_rows_are_counted_in_words() -> None:
    assert [count_rows(n) for n in (1, 2)] == ["1 row", "2 rows"]
