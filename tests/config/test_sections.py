import pytest

from lora_cli.config.commands import COMMANDS
from lora_cli.config.decode import decode
from lora_cli.config.schema import all_keys, iter_keys, nest
from lora_cli.config.task_families import TASKS

KEYS = {(command, name): key for command in COMMANDS for name, key in all_keys(command).items()}


@pytest.mark.parametrize(("command", "name"), KEYS)
def test_every_setting_has_a_short_help_text(command: str, name: str) -> None:
    text = KEYS[command, name].help
    assert text.endswith((".", "..."))
    assert len(text) <= 94
    assert "\n" not in text


VARIANTS_OF = {
    "optimizer.momentum": ("optimizer.name", "sgd"),
    "scheduler.power": ("scheduler.name", "polynomial"),
}
BOUNDED = [
    (key, dict([VARIANTS_OF[name]] if name in VARIANTS_OF else []))
    for name, key in all_keys("train").items()
    if not name.startswith("task.")
] + [
    (key, {"task.family": family})
    for family, section in TASKS.items()
    for key in iter_keys(section, prefix="task.")
]


def test_bounds_are_enforced() -> None:
    checked = 0
    for key, variant in BOUNDED:
        values = [
            *([key.metadata["min"] - 1] if "min" in key.metadata else []),
            *([key.metadata["max"] + 1] if "max" in key.metadata else []),
            *([key.metadata["above"]] if "above" in key.metadata else []),
            *([key.metadata["below"]] if "below" in key.metadata else []),
        ]
        for value in values:
            given = [value, value] if isinstance(key.default, tuple) else value
            _, problems = decode(COMMANDS["train"], nest({key.name: given} | variant))
            assert [problem.key for problem in problems] == [key.name]
            checked += 1
    assert checked > 20
