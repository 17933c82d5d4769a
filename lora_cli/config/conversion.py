"""Settings of `lora-cli convert`."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal

from lora_cli.config.sections import path_field
from lora_cli.errors import Problem

_FIX = "lora-cli convert adapter=DIR output=DIR"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Write an adapter that another program trained in the format of PEFT, or in another rank."""

    adapter: str | None = path_field()
    """Folder or .safetensors file: lora-cli, PEFT, mlx-lm, torchtune, kohya or loralib."""

    base: str | None = path_field()
    """The base model: a folder or a hub id. Shapes are checked against it; some formats need it."""

    r: int | None = field(default=None, metadata={"min": 1})
    """Rank to write: a larger one changes nothing, a smaller one comes as close as it can."""

    alpha: float | None = field(default=None, metadata={"above": 0})
    """Strength of the update, for formats whose files do not say it (loralib)."""

    to: Literal["peft"] = "peft"
    """Format to write."""

    output: str | None = path_field()
    """Folder to write."""


def check_convert(config: ConvertConfig, _: Collection[str]) -> Iterator[Problem]:
    """Yield a problem for each path that is missing."""
    for key, what in (("adapter", "name an adapter"), ("output", "say where to write")):
        if not getattr(config, key):
            yield Problem(
                id="config.missing",
                message=f"`{key}` must {what}, but is null.",
                key=key,
                fix=_FIX,
            )
