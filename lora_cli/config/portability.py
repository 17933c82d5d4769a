"""Settings of `lora-cli check`."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal

from lora_cli.config.sections import path_field
from lora_cli.errors import Problem

Runtime = Literal["peft", "transformers", "vllm", "llama.cpp"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckConfig:
    """Tell whether other programs would load an adapter, and what to change if not."""

    from_: str | None = path_field()
    """Run or adapter directory, of lora-cli or of any program that writes PEFT's files."""

    for_: tuple[Runtime, ...] = field(default=("peft", "transformers", "vllm", "llama.cpp"))
    """Programs to check for."""

    base: str | None = path_field()
    """Base model whose layers and shapes are compared; its weights are not read."""


def check_for(config: CheckConfig, _: Collection[str]) -> Iterator[Problem]:
    """Yield a problem where no program is named."""
    if not config.for_:
        yield Problem(
            id="config.bad-value",
            message="`for` must name at least one program, but is empty.",
            key="for",
            allowed="peft, transformers, vllm, llama.cpp",
            fix="leave it out to check for all of them",
        )
