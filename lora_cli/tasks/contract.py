"""What a task family must provide; the training loop and every command see nothing else of it.

A family adds one file beside this one and one row in `lora_cli.tasks.table`. It decides what a row
looks like, how it becomes a batch, what is computed on it and what the outputs mean. It may run the
model in any way inside `forward`: on packed tokens, on some positions only, with a sampled
negative, by generating. The trainer knows none of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from lora_cli.data.types import Row, Splits
from lora_cli.models.sources import ModelSource

Features = dict[str, Any]
Batch = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one forward pass gives.

    Attributes:
        loss_sum: Scalar, float32: sum of the loss over the supervised items of the batch. The
            trainer alone divides, by the count over the whole optimizer step and all processes.
        count: Number of supervised items (rows, tokens, pairs), weighted as the loss weights them.
        outputs: Tensors that `decode` needs, detached or not, with the batch dimension first.
    """

    loss_sum: torch.Tensor
    count: float
    outputs: Mapping[str, torch.Tensor]


class Task(Protocol):
    """A family bound to its configuration, to what the data taught it, and to a processor."""

    metric: str
    """Name of the metric that selects the best checkpoint; a key of what `metrics` returns."""

    greater_is_better: bool
    """Whether a larger value of `metric` is an improvement."""

    couples_rows: bool
    """Whether the loss of a row depends on the other rows of its batch."""

    def encode(self, row: Row) -> Features:
        """Turn one row into model inputs; pure, so that its result may be cached.

        Returns a dict with `id`, `length` (a cost, used to put rows of like size together), `cut`
        (the number of tokens that a limit left out), `supervised` (the number of things in it
        to learn from: rows, words, tokens) and whatever `collate` reads. Where `left_out` is true
        the row is not used, in training and evaluation. Of a row that is no text, `measures` holds
        sizes by name and `kinds` other properties, as texts; the report of the data shows both.

        Raises UserError that names the row if it cannot be encoded, UnreadableError if the reason
        is a file.
        """

    def collate(self, features: Sequence[Features]) -> Batch:
        """Stack encoded rows into one batch; `batch["ids"]` holds the row ids in order.

        Many batches may be kept at once. What is large, such as decoded images, is made in
        `forward`.
        """

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Run the model on one batch and return the summed loss, the count and the outputs.

        In training, `batch["label_smoothing"]` may hold the share of each label that is to be
        spread over all labels. Families whose loss has no such thing are not given any: they are
        left out of what `trainer.label_smoothing` may be set with. `batch["seed"]` is a number
        that differs from step to step, for families that draw something themselves: with the id of
        a row it says what to draw for it, in whatever batch or process that row is. Outside of
        training there is none.

        Outside of training a family may generate as well, unless `batch["generate"]` is false:
        then two forms of a model are compared by what they compute.
        """

    def decode(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> list[Any]:
        """Turn the outputs of a batch into one prediction a row, each with its row id."""

    def metrics(self, predictions: Sequence[Any]) -> dict[str, float]:
        """Compute every metric of the family, once, from all predictions of a split."""

    def report(self, predictions: Sequence[Any]) -> dict[str, Any]:
        """Compute the details that a person reads; empty where the metrics say it all.

        Either `labels`, `classes` (of each label its precision, recall, f1 and support; with iou
        where pixels are counted, and ap, ap_50 and support for boxes), `macro`
        and `weighted` (averages of these) and, where there is one, `confusion`, the counts by
        true and predicted label.
        """

    def to_json(self, prediction: Any) -> dict[str, Any]:
        """Turn a prediction into plain JSON values for a line of a predictions file."""


class Family(Protocol):
    """One row of the table of families: stateless, knows how to start a task."""

    auto_class: str
    """Name of the transformers class that loads a base model with this family's head."""

    task_type: str | None
    """PEFT's name for the kind of task; null where PEFT's wrappers would add wrong inputs."""

    processor: str
    """What turns rows into inputs: one of `lora_cli.models.folders.PROCESSOR_FILES`."""

    def load(self, config: Any, *, seed: int) -> Splits:
        """Read and check the rows, and learn what the task needs to know from them.

        Raises UserError with every problem of the data that was found.
        """

    def made_up_rows(self, config: Any, count: int) -> Sequence[Mapping[str, Any]]:
        """Return rows with the columns of the settings, for data that cannot be reached."""

    def load_more(
        self, config: Any, state: Mapping[str, Any], *, seed: int
    ) -> tuple[Splits, Mapping[str, Any]]:
        """Read and check labelled rows for a task that has learned its state already.

        Nothing is learned from them and no split is cut; a single file is the split "test". The
        second value is the state with the columns of these rows. Raises UserError as `load` does.
        """

    def bind_columns(
        self, columns: Sequence[str], state: Mapping[str, Any], *, where: str
    ) -> Mapping[str, Any]:
        """Return the state for rows without labels that have these columns.

        Raises UserError if a column that the task reads is missing.
        """

    def count_labels(self, rows: Sequence[Row], state: Mapping[str, Any]) -> Mapping[str, int]:
        """Return how often each label is there; nothing where targets are no labels."""

    def arrange(
        self, config: Any, features: Sequence[Features], model: nn.Module
    ) -> tuple[Sequence[Features], tuple[str, ...]]:
        """Put encoded training rows together as they are to be trained on, such as several in one.

        The second value says what was done, in sentences. `model` is in evaluation mode.
        """

    def check_row(self, row: Row, state: Mapping[str, Any]) -> None:
        """Raise UserError if the task cannot predict this row."""

    def model_options(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return keyword arguments for `from_pretrained`, such as the number of labels."""

    def check_head(self, source: ModelSource, state: Mapping[str, Any]) -> tuple[bool, str]:
        """Say whether a head of the right size that the base has says what the task wants.

        The second value tells it to the user, if there is something to tell. Otherwise a new head
        is made.
        """

    def fit_model(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Change a model that was just loaded to what is known from the data, in place, if so."""

    def fit_processor(self, processor: Any, state: Mapping[str, Any]) -> Any:
        """Return the processor that goes with such a model; the one given may be changed."""

    def start_head(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Change the random values of a new head to what is known from the data, if anything."""

    def build(self, config: Any, state: Mapping[str, Any], processor: Any) -> Task:
        """Bind the family to its configuration, to a saved state and to a processor."""
