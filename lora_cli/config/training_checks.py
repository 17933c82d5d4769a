"""Rules on optimizers and the way of training that concern several settings at once."""

from collections.abc import Collection, Iterator

from lora_cli.config.commands import TrainConfig
from lora_cli.config.generation import GenerationConfig, check_generation
from lora_cli.config.media import ZeroShotConfig, check_zero_shot
from lora_cli.errors import Problem


def check_schedule_free(config: TrainConfig, _: Collection[str]) -> Iterator[Problem]:
    """Refuse what would work against the averages of a schedule-free optimizer."""
    if config.optimizer.name != "schedule_free":
        return
    if config.scheduler.name != "constant":
        yield Problem(
            id="config.schedule-free",
            message="`scheduler` must be constant with optimizer=schedule_free, whose averages"
            f" take the place of a schedule, but is {config.scheduler.name}.",
            key="scheduler",
            allowed="constant, with a warm-up or without",
            fix="leave it out, or choose scheduler=constant",
        )
    if config.lora.variant == "adalora":
        yield Problem(
            id="config.schedule-free",
            message="`lora.variant` must have ranks that stay as they are with"
            " optimizer=schedule_free, in whose averages those that were taken away live on, but"
            " is adalora.",
            key="lora.variant",
            fix="optimizer=adamw, or another variant",
        )


def check_text_generation(config: TrainConfig, user: Collection[str]) -> Iterator[Problem]:
    """Check how texts are generated, for the families that do."""
    found, section = getattr(config.task, "generation", None), "task.generation"
    if isinstance(found, GenerationConfig):
        start = f"{section}."
        given = frozenset(name.removeprefix(start) for name in user if name.startswith(start))
        yield from check_generation(found, section=section, given=given)


def check_labels_told(config: TrainConfig, _: Collection[str]) -> Iterator[Problem]:
    """Check the labels of zero-shot classification, for the families that have such."""
    found = getattr(config.task, "zero_shot", None)
    if isinstance(found, ZeroShotConfig):
        yield from check_zero_shot(found, section="task.zero_shot")
