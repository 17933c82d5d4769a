import pytest

from lora_cli.config.commands import COMMANDS
from lora_cli.config.decode import decode
from lora_cli.config.schema import all_keys, nest

KEYS = {(command, name): key for command in COMMANDS for name, key in all_keys(command).items()}


@pytest.mark.parametrize(("command", "name"), KEYS)
def test_every_setting_has_a_short_help_text(command: str, name: str) -> None:
    text = KEYS[command, name].help
    assert text.endswith((".", "..."))
    assert len(text) <= 94
    assert "\n" not in text


def test_bounds_are_enforced() -> None:
    checked = 0
    for name, key in all_keys("train").items():
        values = [
            *([key.metadata["min"] - 1] if "min" in key.metadata else []),
            *([key.metadata["max"] + 1] if "max" in key.metadata else []),
            *([key.metadata["above"]] if "above" in key.metadata else []),
            *([key.metadata["below"]] if "below" in key.metadata else []),
        ]
        variant = {
            "optimizer.momentum": ("optimizer.name", "sgd"),
            "scheduler.power": ("scheduler.name", "polynomial"),
        }.get(name)
        for value in values:
            given = [value, value] if isinstance(key.default, tuple) else value
            plain = nest({name: given} | ({variant[0]: variant[1]} if variant else {}))
            _, problems = decode(COMMANDS["train"], plain)
            assert [problem.key for problem in problems] == [name]
            checked += 1
    assert checked > 20
