"""Base models with the head of a task."""

from collections.abc import Mapping
from typing import Any

from lora_cli.models.base import BaseModel, load_base
from lora_cli.models.sources import ModelSource
from lora_cli.tasks.contract import Family


def load_with_head(
    source: ModelSource, family: Family, state: Mapping[str, Any], *, dtype: str, seed: int
) -> BaseModel:
    """Load a base model with the head of a task, as it is before training.

    Args:
        source: What `resolve_model` found.
        family: The family of the task.
        state: What the task learned from its data.
        dtype: As in `load_base`.
        seed: Decides the start of a new head.

    Raises:
        UserError: As `load_base` does.
    """
    base = load_base(
        source,
        auto_class=family.auto_class,
        options=family.model_options(state),
        dtype=dtype,
        seed=seed,
    )
    family.fit_model(base.model, state)
    if base.new_keys:
        family.start_head(base.model, state)
    return base
