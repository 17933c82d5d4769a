"""Which head the checkpoint of a model has."""

from typing import Any

import transformers

from lora_cli.tasks.table import FAMILIES


def find_head(config: Any) -> tuple[str, str | None] | None:
    """Return the Auto class that loads a model's own class, and PEFT's name for its task.

    Args:
        config: Of transformers.

    Returns:
        AutoModel and None for a body; None if the head is of no task family, or none is named.
    """
    names = config.architectures or ()
    known = [(family.auto_class, family.task_type) for family in FAMILIES.values()]
    for auto_class, task_type in [*known, ("AutoModel", None)]:
        classes = getattr(transformers, auto_class)._model_mapping.get(type(config), ())
        for cls in classes if isinstance(classes, tuple) else (classes,):
            if cls.__name__ in names:
                return auto_class, task_type
    return None
