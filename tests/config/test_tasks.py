from dataclasses import fields

import pytest

from lora_cli.config.tasks import TASKS, DataConfig


@pytest.mark.parametrize("name", TASKS)
def test_a_family_is_found_under_its_own_name(name: str) -> None:
    config = TASKS[name]()
    assert config.family == name
    assert config.metric
    assert config.max_length >= 4


def test_every_column_is_read_by_families_that_there_are() -> None:
    for item in fields(DataConfig):
        families = item.metadata.get("only", {}).get("task.family", ())
        assert set(families) <= set(TASKS)
        assert families or "column" not in item.name


def test_every_family_reads_a_column() -> None:
    read = {
        family
        for item in fields(DataConfig)
        for family in item.metadata.get("only", {}).get("task.family", ())
    }
    assert read == set(TASKS)
