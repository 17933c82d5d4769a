"""Running a model over rows without changing it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_cli.tasks.contract import Features, Task
from lora_cli.training.order import cut_by_length
from lora_cli.training.runtime import move_to


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model said about some rows.

    Attributes:
        predictions: One for each row, in the order of the rows.
        loss: Mean loss per supervised item; None when no row has a label.
    """

    predictions: tuple[Any, ...]
    loss: float | None

    def metrics(self, task: Task) -> dict[str, float]:
        """Return every metric of the task, and the loss."""
        values = dict(task.metrics(self.predictions))
        if self.loss is not None:
            values["loss"] = self.loss
        return values


@contextmanager
def evaluating(model: Callable[..., Any]) -> Iterator[None]:
    """Put the model into evaluation mode, then every module back into the mode that it had.

    Anything that is not a module, such as an ONNX session, has no modes and is left alone.
    """
    modes = {}
    if isinstance(model, nn.Module):
        modes = {module: module.training for module in model.modules()}
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def evaluate_rows(
    task: Task,
    model: Callable[..., Any],
    features: Sequence[Features],
    *,
    batch_size: int,
    device: torch.device,
    on_rows: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Run the model once over each row; rows of like length share a batch.

    Args:
        task: Says how to batch, run and read the model.
        model: A module, or any callable that the task's `forward` can run.
        features: Encoded rows.
        batch_size: Rows of one forward pass.
        device: Where the model is.
        on_rows: Called after each batch with the number of rows done.
    """
    batches = cut_by_length(
        range(len(features)), [row["length"] for row in features], size=batch_size
    )
    predictions: list[Any] = [None] * len(features)
    loss_sum, count, done = 0.0, 0.0, 0
    with evaluating(model), torch.inference_mode():
        for indices in batches:
            batch = move_to(task.collate([features[index] for index in indices]), device)
            output = task.forward(model, batch)
            loss_sum += float(output.loss_sum)
            count += output.count
            decoded = task.decode(output.outputs, batch)
            for index, prediction in zip(indices, decoded, strict=True):
                predictions[index] = prediction
            done += len(indices)
            on_rows(done)
    return Evaluation(tuple(predictions), loss_sum / count if count else None)
