"""Encoded rows made ready: those that are not to be used left out, those of train put together."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from lora_cli.commands.display import Display
from lora_cli.config.commands import TrainConfig
from lora_cli.config.language import CausalLanguageModelingConfig, ChatConfig
from lora_cli.errors import Problem, UserError
from lora_cli.tasks.contract import Features
from lora_cli.tasks.table import FAMILIES
from lora_cli.training.evaluation import evaluating


def leave_out(features: Sequence[Features], name: str, display: Display) -> Sequence[Features]:
    """Leave out the rows that their task does not want to use, and say how many they are.

    Args:
        features: Encoded rows.
        name: Of the split.
        display: Told of it.

    Raises:
        UserError: If no row is left.
    """
    places = [place for place, row in enumerate(features) if not row.get("left_out")]
    if len(places) == len(features):
        return features
    if not places:
        raise UserError(
            Problem(
                id="task.all-overlong",
                message=f"`task.max_length` must be enough for some rows of {name}, but all "
                f"{len(features):,} are longer.",
                key="task.max_length",
                fix="raise task.max_length, or task.overlong=truncate",
            )
        )
    count = len(features) - len(places)
    display.note(
        f"{name}: left out {count:,} of {len(features):,} rows, longer than task.max_length"
    )
    return [features[place] for place in places]


def arrange_rows(
    config: TrainConfig, features: Sequence[Features], model: nn.Module, display: Display
) -> Sequence[Features]:
    """Put encoded rows of train together as the task wants them, and say what was done.

    Args:
        config: Of the run.
        features: Encoded rows.
        model: The model that is trained.
        display: Told of it.
    """
    task = config.task
    has_prefix = config.strategy.name == "prefix"
    if isinstance(task, CausalLanguageModelingConfig | ChatConfig) and task.packing and has_prefix:
        display.note("not packed: the prefix would be seen by the first text of a row alone")
        task = replace(task, packing=False)
    with evaluating(model):
        arranged, notes = FAMILIES[task.family].arrange(task, features, model)
    for note in notes:
        display.note(f"train: {note}")
    return arranged
