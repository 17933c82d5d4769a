"""What the families with labels do alike, tried with each of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_cli.config.task_families import TASKS
from lora_cli.config.tasks import DataConfig
from lora_cli.errors import UserError
from lora_cli.tasks.labels import indices_of
from lora_cli.tasks.table import FAMILIES

CASES = {
    "text_classification": ("label", lambda label: label, {"text": "x"}),
    "multi_label_classification": ("label", lambda label: [label], {"text": "x"}),
    "token_classification": ("tags", lambda label: [label], {"tokens": ["x"]}),
}


def load(name: str, folder: Path, labels: dict[str, list[Any]], **data: Any) -> Any:
    column, hold, inputs = CASES[name]
    for split, values in labels.items():
        lines = [json.dumps({**inputs, column: hold(value)}) for value in values]
        (folder / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines))
    metric = {"metric": "accuracy"} if name == "token_classification" else {}
    config = TASKS[name](data=DataConfig(path=str(folder), **data), **metric)  # type: ignore[arg-type]
    return FAMILIES[name].load(config, seed=0)


@pytest.mark.parametrize("name", CASES)
def test_names_are_sorted_and_name_the_outputs(name: str, tmp_path: Path) -> None:
    splits = load(name, tmp_path, {"train": ["b", "c", "a"], "validation": ["a"]})
    assert indices_of(splits.state) == {"a": 0, "b": 1, "c": 2}
    assert FAMILIES[name].model_options(splits.state)["label2id"] == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize("name", CASES)
def test_integers_stand_for_names_that_are_given(name: str, tmp_path: Path) -> None:
    rows = {"train": [0, 1], "validation": [1]}
    splits = load(name, tmp_path, rows, label_names=("no", "yes", "maybe"))
    assert splits.state["numbered"] is True
    assert indices_of(splits.state)["1"] == 1
    assert any("cannot be learned: maybe" in note for note in splits.notes)


@pytest.mark.parametrize("name", CASES)
def test_one_label_teaches_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two different labels") as caught:
        load(name, tmp_path, {"train": ["a", "a"], "validation": ["a"]})
    assert caught.value.problems[0].key == f"task.data.{CASES[name][0]}_column"


@pytest.mark.parametrize("name", CASES)
def test_a_label_of_validation_alone_is_refused_with_its_row(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(name, tmp_path, {"train": ["a", "b"], "validation": ["a", "z"]})
    assert caught.value.problems[0].where == f'{tmp_path}/validation.jsonl row 2 ("z")'


@pytest.mark.parametrize("name", CASES)
def test_names_of_other_rows_must_be_those_of_training(name: str) -> None:
    family: Any = FAMILIES[name]
    state = {"labels": ["a", "b"], "numbered": False}
    same = TASKS[name](data=DataConfig(label_names=("a", "b")))
    assert family.rebind(same, state)["numbered"] is True
    other = TASKS[name](data=DataConfig(label_names=("b", "a")))
    with pytest.raises(UserError, match="trained on, in their order"):
        family.rebind(other, state)
    assert family.rebind(TASKS[name](), state) == state
