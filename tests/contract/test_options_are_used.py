"""No setting is decoded and then forgotten: something outside `config` reads each of them."""

import ast
import dataclasses
from pathlib import Path

import pytest

from lora_cli.config import adapters, audio, distributed, media, optim, sections, strategies, tasks
from lora_cli.config import commands as command_configs
from lora_cli.tasks.table import FAMILIES

PACKAGE = Path(__file__).parents[2] / "lora_cli"
READERS = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "config"]
# Decided before the config is decoded, by the config group that was chosen.
DECIDES_THE_CLASS = {
    (cls.__name__, tag)
    for tag, table in command_configs.VARIANTS.values()
    for cls in table.values()
    if tag == "name"
}
FIELDS = sorted(
    {
        (cls.__name__, field.name)
        for module in (
            *(sections, adapters, distributed, strategies, optim, tasks, media, audio),
            command_configs,
        )
        for cls in vars(module).values()
        if isinstance(cls, type) and dataclasses.is_dataclass(cls)
        for field in dataclasses.fields(cls)
    }
    - DECIDES_THE_CLASS
)


def read_names() -> set[str]:
    """Return every attribute that code outside `config` reads or matches."""
    names: set[str] = set()
    for path in READERS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.MatchClass):
                names.update(node.kwd_attrs)
    # The columns of families are read by the names of their roles.
    for family in FAMILIES.values():
        roles = (*getattr(family, "inputs", ()), *getattr(family, "targets", ()))
        names.update(f"{role.name}_column" for role in roles)
    return names


NAMES = read_names()


def test_there_is_something_to_check() -> None:
    assert len(FIELDS) > 40
    assert len(READERS) > 20


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_every_setting_is_read(section: str, field: str) -> None:
    assert field in NAMES
