"""The terminal does everything that a command may ask of a display."""

import inspect

import pytest

from lora_cli.cli.terminal import Terminal
from lora_cli.commands.display import Display

METHODS = [name for name in vars(Display) if not name.startswith("_")]


def test_there_are_methods() -> None:
    names = {"note", "table", "track", "transfer", "on_event", "output", "piece", "result"}
    assert names == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_the_terminal_takes_what_the_protocol_promises(name: str) -> None:
    promised = inspect.signature(getattr(Display, name)).parameters
    assert list(inspect.signature(getattr(Terminal, name)).parameters) == list(promised)
