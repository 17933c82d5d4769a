"""What a base model that is not trained makes of rows, for the baselines of `baselines.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_cli.commands.preparing import load_model
from lora_cli.config.commands import TrainConfig
from lora_cli.data.types import Row
from lora_cli.models.heads import head_names
from lora_cli.models.sources import resolve_model
from lora_cli.tasks.table import FAMILIES

_BATCH = 32


def head_inputs(
    config: TrainConfig, state: Mapping[str, Any], splits: Mapping[str, Sequence[Row]]
) -> dict[str, Any]:
    """Return what the head of the untrained base is given for each row, by split.

    That of sounds begins with a layer at each moment, whose inputs are averaged over time; batches
    of one keep their rows in order, whatever their lengths.

    Args:
        config: Of a run.
        state: What its task learned from the data.
        splits: Rows by name.
    """
    kind = FAMILIES[config.task.family].processor
    source = resolve_model(str(config.model.path), processor=kind)
    base, _, task = load_model(source, config, state)
    seen: list[Any] = []
    first = "projector" if hasattr(base.model, "projector") else head_names(base.model)[-1]
    size = 1 if kind == "feature extractor" else _BATCH

    def keep(_: Any, given: Any) -> None:
        seen.append(given[0].mean(1) if given[0].dim() == 3 else given[0].flatten(1))

    base.model.get_submodule(first).register_forward_pre_hook(keep)
    found = {}
    for name, rows in splits.items():
        seen.clear()
        with torch.inference_mode():
            for start in range(0, len(rows), size):
                features = [task.encode(row) for row in rows[start : start + size]]
                task.forward(base.model, task.collate(features))
        found[name] = torch.cat(seen).numpy()
    return found
