"""Composing through the real parser, without running a command."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lora_cli.cli.argv import split
from lora_cli.config.composed import Composed
from lora_cli.config.launch import run_command
from lora_cli.errors import Problem, UserError

Compose = Callable[..., list[Composed]]
Problems = Callable[..., list[Problem]]


@pytest.fixture
def compose_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compose:
    """Give the composed configuration of each job of a command line, from an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> list[Composed]:
        seen: list[Composed] = []

        def job(composed: Composed) -> int:
            seen.append(composed)
            return 0

        line = split(arguments)
        assert line.command is not None
        code = run_command(
            line.command, line.overrides, line.hydra_flags, recipe=line.recipe, job=job
        )
        assert code == 0
        return seen

    return run


@pytest.fixture
def problems_of(compose_all: Compose) -> Problems:
    """Give the problems of a command line that must not run."""

    def run(*arguments: str) -> list[Problem]:
        with pytest.raises(UserError) as caught:
            compose_all(*arguments)
        return list(caught.value.problems)

    return run
