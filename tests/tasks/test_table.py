import pytest
import transformers
from peft import TaskType

from lora_cli.config.commands import VARIANTS
from lora_cli.tasks.table import FAMILIES


def test_every_family_has_its_configuration() -> None:
    assert set(FAMILIES) == set(VARIANTS["task"][1])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_names_exists(name: str) -> None:
    family = FAMILIES[name]
    assert hasattr(transformers, family.auto_class)
    assert family.task_type is None or TaskType(family.task_type)
