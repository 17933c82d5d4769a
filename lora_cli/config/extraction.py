"""Settings of `lora-cli extract`."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from lora_cli.config.sections import path_field
from lora_cli.errors import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class RankConfig:
    """How large an adapter is that is not trained."""

    r: int = field(default=16, metadata={"min": 1})
    """Rank of the update of each layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractConfig:
    """Write the difference of two checkpoints as an adapter for PEFT."""

    base: str | None = path_field()
    """The checkpoint before: a folder or a hub id."""

    tuned: str | None = path_field()
    """The checkpoint after, of the same architecture."""

    lora: RankConfig = field(default_factory=RankConfig)

    output: str | None = path_field()
    """Folder to write."""


def check_extract(config: ExtractConfig, _: Collection[str]) -> Iterator[Problem]:
    """Yield a problem for each path that is missing."""
    for key, what in (("base", "the checkpoint before"), ("tuned", "the checkpoint after")):
        if not getattr(config, key):
            yield Problem(
                id="config.missing",
                message=f"`{key}` must name {what}, but is null.",
                key=key,
                fix="lora-cli extract base=DIR tuned=DIR lora.r=16 output=DIR",
            )
    if not config.output:
        yield Problem(
            id="config.missing",
            message="`output` must say where to write, but is null.",
            key="output",
            fix="output=DIR",
        )
