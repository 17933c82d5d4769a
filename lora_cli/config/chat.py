"""The configuration of `lora-cli chat`."""

from dataclasses import dataclass, field

from lora_cli.config.generation import GenerationOverrides
from lora_cli.config.sections import path_field, text_field


@dataclass(frozen=True, kw_only=True, slots=True)
class TalkConfig:
    """Talk with an adapter of task=chat in the terminal; /reset forgets all, /exit ends it."""

    from_: str | None = path_field()
    """Run or adapter directory."""

    base: str | None = path_field()
    """Where the base model is now, if it has moved; its sha256 must be the recorded one."""

    system: str | None = text_field()
    """System prompt; null takes task.system_prompt of the training, or that of the template."""

    generation: GenerationOverrides = field(default_factory=GenerationOverrides)
