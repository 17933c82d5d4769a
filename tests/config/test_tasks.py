from dataclasses import fields

from lora_cli.config.task_families import TASKS
from lora_cli.config.tasks import DataConfig


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
