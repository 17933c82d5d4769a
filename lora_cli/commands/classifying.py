"""Labels that images are given by a model that was not trained on labels, for eval and predict."""

from dataclasses import replace
from typing import Any, TypeVar

from lora_cli.config.media import ZeroShotConfig
from lora_cli.config.task_families import TASKS, TaskConfig
from lora_cli.errors import Problem, UserError

Settings = TypeVar("Settings", bound=TaskConfig)


def with_labels(task: Settings, wanted: ZeroShotConfig) -> Settings:
    """Return the settings of a task with other labels, or another prompt for them.

    Args:
        task: As the adapter was trained.
        wanted: What is to be changed.

    Raises:
        UserError: If the family does not classify so, or a prompt has no labels.
    """
    given = {name: getattr(wanted, name) for name in ("labels", "prompt")}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return task
    own = getattr(task, "zero_shot", None)
    if not isinstance(own, ZeroShotConfig):
        raise UserError(_not_so(task.family, next(iter(given))))
    found = replace(own, **given)
    if found.labels is None:
        raise UserError(_no_labels())
    changed: dict[str, Any] = {"zero_shot": found}
    return replace(task, **changed)


def _not_so(family: str, name: str) -> Problem:
    able = [name for name, kind in TASKS.items() if "zero_shot" in kind.__dataclass_fields__]
    return Problem(
        id="predict.no-zero-shot",
        message=f"`zero_shot.{name}` must be left out with an adapter for task={family}, which "
        "compares images with no texts.",
        key=f"zero_shot.{name}",
        allowed=f"with an adapter for {' or '.join(able)}",
        fix=f"leave zero_shot.{name} out",
    )


def _no_labels() -> Problem:
    return Problem(
        id="predict.prompt-alone",
        message="`zero_shot.prompt` must come with the labels that take the place of {}, but "
        "`zero_shot.labels` is not set.",
        key="zero_shot.prompt",
        fix="zero_shot.labels=[cat,dog]",
    )
