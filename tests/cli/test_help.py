import shlex

import pytest

from lora_cli.cli.argv import ALL_FLAGS, split
from lora_cli.cli.help import EXAMPLES, command_help, overview
from lora_cli.config.commands import COMMANDS
from lora_cli.config.groups import default_options, group_options
from lora_cli.config.schema import all_keys


def test_the_overview_names_everything() -> None:
    text = overview()
    assert all(f"  {command} " in text for command in COMMANDS)
    assert all(flag in text for flag in ALL_FLAGS if flag not in {"--package", "--resolve"})


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_complete_and_in_order(command: str) -> None:
    text = command_help(command)
    for name, key in all_keys(command).items():
        assert f"  {name}  (" in text
        assert key.help in text
    for group in default_options(command):
        assert all(f"\n    {option}" in text for option in group_options(group))
    positions = [text.index(part) for part in ("examples:", "settings", "flags:")]
    assert positions == sorted(positions)


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_examples_are_valid_command_lines(line: str) -> None:
    words = shlex.split(line.rpartition("|")[2].partition(">")[0])
    assert words[0] == "lora-cli"
    invocation = split(words[1:])
    assert invocation.command in COMMANDS
    for override in invocation.overrides:
        key = override.partition("=")[0]
        assert key in all_keys(words[1]) or key in default_options(words[1])
