"""Running a model over rows without changing it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_cli.tasks.contract import Features, Task
from lora_cli.training.group import ALONE, Group
from lora_cli.training.memory import memory_checked
from lora_cli.training.order import cut_by_length
from lora_cli.training.runtime import move_to
from lora_cli.training.sharding import is_sharded


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


class EvaluationStopped(Exception):  # noqa: N818  # nothing is wrong
    """An evaluation was asked to stop, and has no result."""


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
    group: Group = ALONE,
    should_stop: Callable[[], bool] | None = None,
) -> Evaluation:
    """Run the model once over each row; rows of like length share a batch.

    Each batch is run by one of the processes, and all of them return the same: to the last bit
    what one process alone would have returned, since the batches do not depend on their number.

    Args:
        task: Says how to batch, run and read the model.
        model: A module, or any callable that the task's `forward` can run.
        features: Encoded rows.
        batch_size: Rows of one forward pass.
        device: Where the model is.
        on_rows: Called after each batch of this process with the number of rows done by all.
        group: The processes that share the work.
        should_stop: Asked before each batch; true in any process ends the evaluation.

    Raises:
        EvaluationStopped: If it was asked to stop.
        RunFailedError: If a batch does not fit into memory.
    """
    batches = cut_by_length(
        range(len(features)), [row["length"] for row in features], size=batch_size
    )
    work = _Work(task, features, batches, device=device, group=group)
    done = 0
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(batches), group.size):
            if should_stop is not None and group.any(should_stop()):
                raise EvaluationStopped
            with group.together(), memory_checked(batch_size, "evaluating"):
                if start + group.rank < len(batches):
                    work.run(model, start + group.rank)
                elif is_sharded(model):
                    work.run_along(model, start)
            done += sum(len(batch) for batch in batches[start : start + group.size])
            on_rows(done)
    return work.result()


class _Work:
    """The batches of an evaluation, and what this process has found out about its own."""

    def __init__(
        self,
        task: Task,
        features: Sequence[Features],
        batches: Sequence[tuple[int, ...]],
        *,
        device: torch.device,
        group: Group,
    ) -> None:
        self._task, self._features, self._batches = task, features, batches
        self._device, self._group = device, group
        self._predictions: list[Any] = [None] * len(features)
        self._outputs: dict[str, torch.Tensor] = {}
        # Loss and count of every batch; zero for those of other processes.
        self._sums = torch.zeros(len(batches), 2, dtype=torch.float64)

    def run(self, model: Callable[..., Any], number: int) -> None:
        batch = self._collate(number)
        output = self._task.forward(model, batch)
        self._sums[number, 0] = float(output.loss_sum)
        self._sums[number, 1] = output.count
        if self._group.size == 1:
            self._decode(number, output.outputs, batch)
        else:
            named = {f"{number}/{name}": x.cpu() for name, x in output.outputs.items()}
            self._outputs |= named

    def run_along(self, model: Callable[..., Any], number: int) -> None:
        """Run a batch of another process, which needs the weights that are kept here."""
        self._task.forward(model, self._collate(number))

    def result(self) -> Evaluation:
        """Put together what all processes have found out."""
        if self._group.size > 1:
            gathered = _by_batch(self._group.gather_tensors(self._outputs))
            for number in range(len(self._batches)):
                found = move_to(gathered.get(number, {}), self._device)
                self._decode(number, found, self._collate(number))
        # In the order of the batches, as one process alone adds them.
        loss_sum, count = 0.0, 0.0
        for batch_sum, batch_count in self._group.add(self._sums).tolist():
            loss_sum, count = loss_sum + batch_sum, count + batch_count
        return Evaluation(tuple(self._predictions), loss_sum / count if count else None)

    def _collate(self, number: int) -> Any:
        rows = [self._features[index] for index in self._batches[number]]
        return move_to(self._task.collate(rows), self._device)

    def _decode(self, number: int, found: Mapping[str, torch.Tensor], batch: Any) -> None:
        decoded = self._task.decode(found, batch)
        for index, prediction in zip(self._batches[number], decoded, strict=True):
            self._predictions[index] = prediction


def _by_batch(
    gathered: Iterable[Mapping[str, torch.Tensor]],
) -> dict[int, dict[str, torch.Tensor]]:
    """Sort the outputs of all processes, named "<batch>/<output>", by the number of the batch."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for tensors in gathered:
        for key, tensor in tensors.items():
            number, _, name = key.partition("/")
            found.setdefault(int(number), {})[name] = tensor
    return found
