"""Composing through the real parser, without running a command."""

from collections.abc import Callable

import pytest

from lora_cli.config.composed import Composed
from lora_cli.errors import Problem, UserError

Compose = Callable[..., list[Composed]]
Problems = Callable[..., list[Problem]]


@pytest.fixture
def problems_of(compose_all: Compose) -> Problems:
    """Give the problems of a command line that must not run."""

    def run(*arguments: str) -> list[Problem]:
        with pytest.raises(UserError) as caught:
            compose_all(*arguments)
        return list(caught.value.problems)

    return run
