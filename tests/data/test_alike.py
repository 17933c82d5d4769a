from lora_cli.data.alike import case_notes, check_alike
from lora_cli.data.types import Row

LABELS = [("a",), ("b",), ("a ",), ("a", "b"), ("b", "\u00a0a"), ("a b",), ("a  b",)]
ROWS = [Row(str(n), {}, "train.csv", n) for n in range(1, len(LABELS) + 1)]


def test_the_rarer_of_two_labels_is_named_with_its_rows() -> None:
    (problem,) = check_alike(ROWS, LABELS, "label")
    assert '"a " beside "a", "a  b" beside "a b", "\u00a0a" beside "a"' in problem.message
    assert problem.where == (
        'train.csv row 3 ("a "), train.csv row 5 ("\u00a0a"), train.csv row 7 ("a  b")'
    )


def test_other_labels_are_no_problem() -> None:
    assert check_alike(ROWS[:3], [("a",), ("A",), ("ab",)], "label") == []
    # White space that all have is part of the label.
    assert check_alike(ROWS[:3], [(" a",), (" b",), (" a",)], "label") == []


def test_at_most_five_names_are_shown() -> None:
    assert case_notes(["a", "b"]) == ()
    assert case_notes([*"abcd", *"ABCD"])[0].endswith(": a, b, c, d, A and 3 more")
