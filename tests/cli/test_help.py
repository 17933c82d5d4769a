import shlex

import pytest

from lora_cli.cli.argv import ALL_FLAGS, split
from lora_cli.cli.help import EXAMPLES, command_help, fold, overview
from lora_cli.config.checks import REFUSED
from lora_cli.config.commands import COMMANDS, VARIANTS
from lora_cli.config.groups import default_options, group_options
from lora_cli.config.schema import all_keys
from lora_cli.config.strategies import LR_FACTOR

TAGS = {f"{section}.{tag}" for section, (tag, _) in VARIANTS.items()}


def test_the_overview_names_everything() -> None:
    text = overview()
    assert all(f"  {command} " in text for command in COMMANDS)
    assert all(flag in text for flag in ALL_FLAGS if flag not in {"--package", "--resolve"})


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_complete_and_in_order(command: str) -> None:
    text = command_help(command)
    hidden = TAGS | set(REFUSED.get(command, ()))
    for name, key in all_keys(command).items():
        assert (f"  {name}  (" in text) == (name not in hidden)
        assert key.help in text or name in hidden
    for group in default_options(command):
        assert all(f"\n    {option}" in text for option in group_options(group))
    positions = [text.index(part) for part in ("examples:", "settings", "flags:")]
    assert positions == sorted(positions)


def test_help_says_with_what_a_setting_is_read() -> None:
    text = command_help("train")
    assert "\nsettings of lora (with strategy=lora|lora_then_full):\n" in text
    assert "  lora.r  (int >= 1; default 8)" in text
    assert "  lora.vera.seed  (int >= 0 <= 4294967295; default 0; with lora.variant=vera)" in text
    assert "  adapter_mode  (continue|merge; default continue; with adapter given)" in text
    assert "strategy=" not in command_help("targets")
    assert "\nsettings of task (with into=model):\n" in command_help("merge")
    assert "  lora.rank_pattern  ({name: int, ...} >= 1; default {};" in text
    assert "usage: lora-cli targets [key=value" in command_help("targets")
    assert "usage: lora-cli merge [DIR] [key=value" in command_help("merge")


def test_help_says_how_the_learning_rate_goes_by_the_strategy() -> None:
    lines = command_help("train").split("\n")
    factors = [line for line in lines if "Unless set, times a factor" in line]
    assert len(factors) == len(VARIANTS["optimizer"][1])
    assert all(len(line) <= 100 and f"full {LR_FACTOR['full']:g}" in line for line in factors)


def test_help_names_the_flags_that_the_command_reads() -> None:
    assert "--resume" in command_help("train")
    assert "--resume" not in command_help("merge")
    assert "--overwrite" in command_help("merge")
    assert "--overwrite" not in command_help("targets")


@pytest.mark.parametrize("command", [None, *COMMANDS])
@pytest.mark.parametrize("width", [60, 80])
def test_wide_lines_are_folded_between_words(command: str | None, width: int) -> None:
    text = overview() if command is None else command_help(command)
    folded = fold(text, width)
    assert folded.split() == text.split()
    examples = {f"  {line}" for lines in EXAMPLES.values() for line in lines}
    for line in folded.split("\n"):
        assert len(line) <= width or line in examples or len(line.split()) == 1
    assert fold(text, 1000) == text


def test_a_folded_line_goes_on_in_its_column() -> None:
    assert fold("  key  one two three", 16) == "  key  one two\n       three"
    assert fold("      one two three", 16) == "      one two\n      three"


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_examples_are_valid_command_lines(line: str) -> None:
    words = shlex.split(line.rpartition("|")[2].partition(">")[0])
    assert words[0] == "lora-cli"
    invocation = split(words[1:])
    assert invocation.command in COMMANDS
    for override in invocation.overrides:
        key = override.partition("=")[0]
        assert key in all_keys(words[1]) or key in default_options(words[1])
