import pytest

from lora_cli.config.task_families import TASKS
from lora_cli.tasks.table import FAMILIES


@pytest.mark.parametrize("name", TASKS)
def test_a_family_is_found_under_its_own_name(name: str) -> None:
    config = TASKS[name]()
    assert config.family == name
    assert config.metric
    assert getattr(config, "max_length", 4) >= 4


def test_the_tables_of_settings_and_of_families_agree() -> None:
    assert list(TASKS) == list(FAMILIES)
