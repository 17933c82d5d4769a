"""What every family of columns does, tried with the one of text pairs."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lora_cli.config.tasks import (
    DataConfig,
    MaskedLanguageModelingConfig,
    TextClassificationConfig,
    TextRegressionConfig,
)
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError
from lora_cli.tasks.rows import Role, raise_if, read_columns
from lora_cli.tasks.table import FAMILIES

FAMILY = FAMILIES["text_regression"]
PAIR = {"text": "a", "text_pair": "b", "label": "score"}
STATE = {"columns": PAIR, "low": 0.0, "high": 1.0, "mean": 0.5}


def write(folder: Path, *, rows: int = 30, **settings: Any) -> TextRegressionConfig:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"a": f"x {n}", "b": f"y {n}", "score": n}) for n in range(rows)]
    (folder / "train.jsonl").write_text("".join(line + "\n" for line in lines))
    return TextRegressionConfig(data=DataConfig(path=str(folder), **settings))


def test_columns_that_nobody_named_are_told(tmp_path: Path) -> None:
    config = write(tmp_path, text_column="a", text_pair_column="b")
    splits = FAMILY.load(config, seed=0)
    assert splits.state["columns"] == PAIR
    assert "label: column score (the first usual name that exists)" in splits.notes
    assert {name: len(rows) for name, rows in splits.rows.items()} == {"train": 27, "validation": 3}


def test_every_column_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    config = write(tmp_path, text_column="x", text_pair_column="y", label_column="z")
    with pytest.raises(UserError) as caught:
        FAMILY.load(config, seed=0)
    keys = [problem.key for problem in caught.value.problems]
    assert keys == [
        "task.data.text_column",
        "task.data.text_pair_column",
        "task.data.label_column",
    ]


def test_a_limit_of_rows_does_not_change_what_is_learned(tmp_path: Path) -> None:
    config = write(tmp_path, text_column="a", max_train_rows=2, max_eval_rows=1)
    splits = FAMILY.load(config, seed=0)
    assert [len(rows) for rows in splits.rows.values()] == [2, 1]
    assert splits.state["high"] - splits.state["low"] > 20


def test_rows_to_predict_must_have_every_input() -> None:
    bound = FAMILY.bind_columns(["b", "a"], STATE, where="new.jsonl")
    assert bound["columns"] == {"text": "a", "text_pair": "b", "label": None}
    # Which of two texts another column is cannot be known.
    with pytest.raises(UserError) as caught:
        FAMILY.bind_columns(["text", "b"], STATE, where="new.jsonl")
    assert caught.value.problems[0].fix == "rename the column with the text to a"
    single = {**STATE, "columns": {**PAIR, "text_pair": None}}
    found = FAMILY.bind_columns(["text", "b"], single, where="new.jsonl")
    assert found["columns"]["text"] == "text"


def test_a_row_to_predict_needs_no_target() -> None:
    FAMILY.check_row(Row("1", {"a": "x", "b": "y"}, "new.jsonl", 1), STATE)
    with pytest.raises(UserError, match="`b` must hold a text"):
        FAMILY.check_row(Row("1", {"a": "x", "b": ""}, "new.jsonl", 1), STATE)


def test_other_rows_are_read_with_their_own_columns(tmp_path: Path) -> None:
    config = write(tmp_path, text_column="b", text_pair_column="a")
    splits, bound = FAMILY.load_more(config, STATE, seed=0)
    assert bound["columns"] == {"text": "b", "text_pair": "a", "label": "score"}
    assert bound["mean"] == 0.5
    assert len(splits.rows["train"]) == 30


def test_columns_are_read_in_the_order_of_the_roles() -> None:
    roles = (Role("second"), Role("first"), Role("none"))
    assert read_columns(roles, {"first": "f", "second": "s", "none": None}) == ["s", "f"]


def test_no_problem_is_no_error() -> None:
    raise_if([])
    with pytest.raises(UserError, match="`x` must be y, but is z"):
        raise_if([Problem(id="a.b", message="`x` must be y, but is z.")])


def test_rows_that_a_data_set_marks_as_unlabelled_are_left_out(tmp_path: Path) -> None:
    labels = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": labels})
    for split, values in (("train", [0, 1, -1, 1, 0]), ("validation", [1, -1])):
        rows = {"text": [f"{split} {n}" for n in range(len(values))], "label": values}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(tmp_path / f"{split}.parquet")
    config = TextClassificationConfig(data=DataConfig(path=str(tmp_path)))
    splits = FAMILIES["text_classification"].load(config, seed=0)
    assert {name: len(rows) for name, rows in splits.rows.items()} == {"train": 4, "validation": 1}
    assert "train: left out 1 of 5 rows, which have no label (label is -1)" in splits.notes
    more, _ = FAMILIES["text_classification"].load_more(config, splits.state, seed=0)
    assert len(more.rows["validation"]) == 1


def test_a_split_of_which_nothing_is_left_is_none(tmp_path: Path) -> None:
    family = FAMILIES["masked_language_modeling"]
    for name, texts in (("train", ["a", "b", "c"]), ("validation", [" "]), ("test", ["", ""])):
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    splits = family.load(MaskedLanguageModelingConfig(data=DataConfig(path=str(tmp_path))), seed=0)
    assert {name: len(rows) for name, rows in splits.rows.items()} == {"train": 2, "validation": 1}
    assert "test: left out 2 of 2 rows, with no text" in splits.notes
    for setting in ("train_split", "validation_split", "test_split"):
        data = DataConfig(path=str(tmp_path), **{setting: "test"})
        with pytest.raises(UserError) as error:
            family.load(MaskedLanguageModelingConfig(data=data), seed=0)
        (problem,) = error.value.problems
        assert (problem.id, problem.key) == ("data.no-rows-left", f"task.data.{setting}")
        assert problem.where == "test: left out 2 of 2 rows, with no text"
        assert problem.allowed == "train"


def test_rows_to_evaluate_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": " "}\n')
    config = MaskedLanguageModelingConfig(data=DataConfig(path=str(tmp_path / "rows.jsonl")))
    state = {"columns": {"text": "text"}}
    with pytest.raises(UserError, match=r"task\.data\.path` must name rows that can be used"):
        FAMILIES["masked_language_modeling"].load_more(config, state, seed=0)
