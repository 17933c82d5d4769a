from typing import Any

import pytest

from lora_cli.config.commands import VARIANTS

TABLES = [
    (section, name) for section in ("optimizer", "scheduler") for name in VARIANTS[section][1]
]


@pytest.mark.parametrize(("section", "name"), TABLES)
def test_each_choice_is_a_config_option(compose_all: Any, section: str, name: str) -> None:
    (composed,) = compose_all("train", "model=bert", "task=sst2", f"{section}={name}")
    assert getattr(composed.config, section) == VARIANTS[section][1][name]()
