import pytest

from lora_cli.data.columns import (
    LABEL_COLUMNS,
    TEXT_COLUMNS,
    canonical_label,
    check_known_labels,
    check_labels,
    check_texts,
    label_indices,
    label_notes,
    list_columns,
    resolve_column,
    resolve_label_names,
)
from lora_cli.data.types import Row
from lora_cli.errors import UserError


def rows_of(column, *values):
    return [Row(str(n), {column: v}, "train.csv", n) for n, v in enumerate(values, start=1)]


def text_column(columns, wanted=None):
    return resolve_column(columns, wanted, known=TEXT_COLUMNS, key="task.data.text_column")


def test_columns_of_all_rows_count():
    rows = [*rows_of("a", 1), *rows_of("b", 2), *rows_of("a", 3)]
    assert list_columns(rows) == ["a", "b"]


def test_the_first_usual_name_is_taken_and_stated():
    assert text_column(["title", "sentence", "text"])[0] == "text"
    assert text_column(["title", "Review"]) == (
        "Review",
        "text: column Review (the first usual name that exists)",
    )
    found = resolve_column(
        ["class", "label"], None, known=LABEL_COLUMNS, key="task.data.label_column"
    )
    assert found[0] == "label"


def test_a_named_column_is_taken_without_remark():
    assert text_column(["text", "body"], "body") == ("body", None)


def test_a_missing_column_is_an_error_with_those_there_are():
    with pytest.raises(UserError) as caught:
        text_column(["text", "label"], "txet")
    problem = caught.value.problems[0]
    assert problem.message == (
        '`task.data.text_column` must name a column of the data, but there is no "txet".'
    )
    assert problem.allowed == "text, label"
    assert problem.fix == 'did you mean "text"?'
    with pytest.raises(UserError) as caught:
        text_column(["source", "goal"])
    assert caught.value.problems[0].allowed == "source, goal"


def test_good_texts_pass():
    assert check_texts(rows_of("text", "a", " b ", "é\n"), "text") == []


def test_bad_texts_are_counted_and_the_first_ten_listed():
    values = ["fine", None, "", " \t\u00a0", 3, ["a"], *[None] * 10]
    (problem,) = check_texts([*rows_of("text", *values), *rows_of("other", 1)], "text")
    assert problem.message == "`text` must hold a text in every row, but is not in 16 rows."
    assert problem.where.startswith(
        "train.csv row 2 (null), train.csv row 3 (empty), train.csv row 4 (empty), "
        "train.csv row 5 (a number), train.csv row 6 (a list), train.csv row 7 (null)"
    )
    assert problem.where.endswith("train.csv row 11 (null) and 6 more")
    assert problem.where.count("row") == 10
    (problem,) = check_texts(rows_of("other", "a"), "text")
    assert problem.message == "`text` must hold a text in every row, but is missing in 1 row."


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("joy", "joy"),
        (" joy", " joy"),
        (3, "3"),
        (-1, "-1"),
        (2.0, "2"),
        (True, "true"),
        (False, "false"),
        (2.5, None),
        (float("nan"), None),
        (float("inf"), None),
        (None, None),
        ("", None),
        ("  ", None),
        (["a"], None),
        ({"a": 1}, None),
    ],
)
def test_labels_as_text(value, label):
    assert canonical_label(value) == label
    problems = check_labels(rows_of("label", value, value), "label")
    assert [problem.id for problem in problems] == ([] if label else ["data.bad-label"])


def test_bad_labels_are_listed():
    (problem,) = check_labels(rows_of("label", "a", 2.5, None), "label")
    assert problem.where == "train.csv row 2 (2.5), train.csv row 3 (null)"


def test_mixed_kinds_of_label_are_refused():
    (problem,) = check_labels(rows_of("label", "a", "b", 1, "a"), "label")
    assert problem.id == "data.bad-label-kind"
    assert problem.where == "train.csv row 3 (a number)"
    assert check_labels(rows_of("label", 1, 2.0, 3), "label") == []


def test_label_names_are_never_in_the_order_first_seen():
    def names(*labels, **given):
        return resolve_label_names(labels, label_names=None, **given)

    assert names("b", "a", "c", "a") == names("c", "b", "a") == ("a", "b", "c")
    assert names("10", "9", "-1") == ("-1", "9", "10")
    assert names("10", "9", "x") == ("10", "9", "x")
    assert names("1", "0", class_names=("no", "yes")) == ("no", "yes")
    given = resolve_label_names(["a", "b"], label_names=("b", "a"), class_names=("x", "y"))
    assert given == ("b", "a")


@pytest.mark.parametrize("labels", [[], ["a"], ["a", "a"]])
def test_one_class_is_an_error(labels):
    with pytest.raises(UserError) as caught:
        resolve_label_names(labels, label_names=("a", "b"))
    assert caught.value.problems[0].id == "data.one-class"


@pytest.mark.parametrize("names", [(), ("a",), ("a", "b", "a")])
def test_given_names_must_differ(names):
    with pytest.raises(UserError) as caught:
        resolve_label_names(["a", "b"], label_names=names)
    assert caught.value.problems[0].fix == "task.data.label_names=[a,b]"


def test_numbers_stand_for_names_only_if_the_order_was_stated():
    assert label_indices(["no", "yes"], numbered=True) == {"no": 0, "yes": 1, "0": 0, "1": 1}
    assert label_indices(["no", "yes"], numbered=False) == {"no": 0, "yes": 1}
    # With names that are numbers, 1 means the name and not the place.
    assert label_indices(["1", "2"], numbered=True) == {"1": 0, "2": 1}
    assert label_indices(["-1", "yes"], numbered=True) == {"-1": 0, "yes": 1}


def test_labels_unseen_in_train_are_listed_with_their_rows():
    rows = rows_of("label", "a", 'c "quoted"', "b", "d")
    indices = label_indices(["a", "b"], numbered=False)
    (problem,) = check_known_labels(rows, "label", indices=indices, stated=False)
    assert problem.message == (
        '`label` must be a label that train has, but 2 rows hold another: c "quoted", d.'
    )
    assert problem.where == 'train.csv row 2 ("c "quoted""), train.csv row 4 ("d")'
    assert problem.allowed == "a, b"
    assert check_known_labels(rows[:1], "label", indices=indices, stated=False) == []
    (problem,) = check_known_labels(rows, "label", indices=indices, stated=True)
    assert "task.data.label_names" in problem.message


def test_names_without_rows_are_noted():
    indices = label_indices(["no", "yes", "maybe"], numbered=True)
    assert label_notes(["no", "yes", "maybe"], ["0", "1"], indices=indices) == (
        "labels without a row in train, which cannot be learned: maybe",
    )
    assert label_notes(["no", "yes"], ["no", "yes"], indices=indices) == ()
