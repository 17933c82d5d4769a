from dataclasses import fields

import pytest

from lora_cli.commands.new_rows import check_new_rows, check_no_new_rows
from lora_cli.config.task_families import TASKS
from lora_cli.config.tasks import DataConfig
from lora_cli.errors import UserError


def test_roles_of_splits_do_nothing_where_nothing_is_trained() -> None:
    data = DataConfig(path="x", train_split="a", validation_split=0.2)
    with pytest.raises(UserError) as caught:
        check_new_rows(data, "text_classification")
    assert [p.key for p in caught.value.problems] == [
        "task.data.train_split",
        "task.data.validation_split",
    ]


@pytest.mark.parametrize("family", TASKS)
def test_columns_are_those_of_the_family(family: str) -> None:
    for item in fields(DataConfig):
        families = item.metadata.get("only", {}).get("task.family")
        if families is None:
            continue
        value = ("a", "b") if "tuple" in str(item.type) else "a"
        data = DataConfig(**{"path": "x", item.name: value})
        if family in families:
            check_new_rows(data, family)
        else:
            with pytest.raises(UserError, match="must be left out with an adapter for"):
                check_new_rows(data, family)


def test_settings_of_rows_that_are_not_named() -> None:
    check_no_new_rows(DataConfig())
    with pytest.raises(UserError, match="must come with"):
        check_no_new_rows(DataConfig(text_column="t", max_eval_rows=3))
