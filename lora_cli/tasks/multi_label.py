"""Multi-label classification: any number of labels for each text, or for each row of other inputs.

The head has one output a label (that of sequence classification for texts), and the loss is binary
cross-entropy, summed over rows and labels; ``weight`` is 1 unless set:
``loss_sum = -sum_bc (y_bc weight_c log s(x_bc) + (1 - y_bc) log(1 - s(x_bc)))``, ``count = B C``,
where s is the logistic function.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from lora_cli.config.tasks import DataConfig, MultiLabelClassificationConfig
from lora_cli.data.columns import list_columns
from lora_cli.data.label_columns import JOINED, join_label_columns
from lora_cli.data.label_lists import check_label_lists, labels_of
from lora_cli.data.made_up import labels
from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError
from lora_cli.tasks.contract import Batch, StepOutput
from lora_cli.tasks.labels import LabelFamily, LabelledTask, Reader, indices_of
from lora_cli.tasks.rows import Columns
from lora_cli.tasks.texts import LABEL, TEXTS, TextFamily, TextReader

LABELS = replace(LABEL, made_up=labels)


@dataclass(frozen=True, slots=True)
class LabelsPrediction:
    """The labels of one row.

    Attributes:
        id: Row id.
        probabilities: One for each label, in label order, each by itself.
        labels: Whether each label is given.
        reference: Whether the row has each label, or None where that is not known.
    """

    id: str
    probabilities: tuple[float, ...]
    labels: tuple[bool, ...]
    reference: tuple[bool, ...] | None


class MultiLabelTask(LabelledTask):
    """A task with any number of labels a row, bound to a configuration, labels and a reader."""

    feature = "labels"

    def __init__(self, config: Any, state: Mapping[str, Any], reader: Reader) -> None:
        super().__init__(config, state, reader)
        self._threshold = config.threshold

    def target_of(self, value: Any) -> list[float]:
        """Return 1 or 0 for each label."""
        labels = [0.0] * len(self._labels)
        for name in labels_of(value) or ():
            labels[self._indices[name]] = 1.0
        return labels

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return the binary cross-entropy, the number of its terms and `logits` of (B, C)."""
        logits_BC = self._logits(model, batch)
        labels_BC = batch["labels"]
        if labels_BC is None:
            return StepOutput(logits_BC.new_zeros(()), 0, {"logits": logits_BC})
        loss_sum = functional.binary_cross_entropy_with_logits(
            logits_BC,
            labels_BC,
            pos_weight=self._weights_on(logits_BC.device),
            reduction="sum",
        )
        return StepOutput(loss_sum, labels_BC.numel(), {"logits": logits_BC})

    def decode(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> list[LabelsPrediction]:
        """Turn logits into probabilities and labels."""
        probabilities_BC = outputs["logits"].cpu().double().sigmoid().tolist()
        labels = batch["labels"]
        references = [None] * len(batch["ids"]) if labels is None else labels.bool().tolist()
        return [
            LabelsPrediction(
                id=row_id,
                probabilities=tuple(row),
                labels=tuple(value >= self._threshold for value in row),
                reference=None if true is None else tuple(true),
            )
            for row_id, row, true in zip(batch["ids"], probabilities_BC, references, strict=True)
        ]

    def metrics(self, predictions: Sequence[LabelsPrediction]) -> dict[str, float]:
        """Return micro_f1, macro_f1 and exact_match."""
        from lora_cli.metrics.multi_label import multi_label_metrics

        return multi_label_metrics(*self._flags(predictions))

    def report(self, predictions: Sequence[LabelsPrediction]) -> dict[str, Any]:
        """Return label names, scores by label and their averages."""
        from lora_cli.metrics.multi_label import multi_label_report

        return {"labels": list(self._labels), **multi_label_report(*self._flags(predictions))}

    def to_json(self, prediction: LabelsPrediction) -> dict[str, Any]:
        """Return id, the names of the labels given and the probability of each; true ones too."""
        line: dict[str, Any] = {
            "id": prediction.id,
            "labels": self._names(prediction.labels),
            "probabilities": dict(zip(self._labels, prediction.probabilities, strict=True)),
        }
        if prediction.reference is not None:
            line["reference"] = self._names(prediction.reference)
        return line

    def _names(self, flags: Sequence[bool]) -> list[str]:
        return [name for name, flag in zip(self._labels, flags, strict=True) if flag]

    def _flags(self, predictions: Sequence[LabelsPrediction]) -> tuple[Any, Any]:
        """Return labels given and there, (N, C), of the rows whose labels are known."""
        import numpy as np

        known = [(p.labels, p.reference) for p in predictions if p.reference is not None]
        shape = (len(known), len(self._labels))
        return (
            np.array([given for given, _ in known], bool).reshape(shape),
            np.array([there for _, there in known], bool).reshape(shape),
        )


class MultiLabelFamily(LabelFamily):
    """A family with any number of labels a row, listed in a column or with a column each."""

    @abstractmethod
    def input_problems(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Return what is wrong with the inputs of these rows."""

    def suit(
        self, data: DataConfig, loaded: Loaded, *, state: Mapping[str, Any] | None = None
    ) -> tuple[DataConfig, Loaded]:
        """Join the columns that are labels into one that lists them.

        Rows that are not for training may have them without being told so.

        Raises:
            UserError: If these are not the labels that were learned, or cannot be joined.
        """
        columns = data.label_columns
        learned = None if state is None else tuple(state["labels"])
        was_joined = state is not None and state["columns"]["label"] == JOINED
        if learned and was_joined and columns is None and data.label_column is None:
            there = list_columns([row for rows in loaded.rows.values() for row in rows])
            columns = learned if set(learned) <= set(there) else None
        if columns is None:
            return data, loaded
        if data.label_column is not None:
            raise UserError(_two_ways(data.label_column))
        if learned is not None and set(columns) != set(learned):
            raise UserError(_other_columns(columns, learned))
        return replace(data, label_column=JOINED), join_label_columns(loaded, columns)

    def made_up_rows(self, config: Any, count: int) -> list[dict[str, Any]]:
        """Return rows with the columns of the settings, one for each label too."""
        rows, columns = super().made_up_rows(config, count), config.data.label_columns or ()
        found = []
        for number, row in enumerate(rows):
            found.append({**row, **{c: int(number % 3 == n % 3) for n, c in enumerate(columns)}})
            if columns:
                del found[-1][self.targets[0].known[0]]
        return found

    def check_rows(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse rows whose input cannot be read, and what is no list of labels."""
        problems, column = self.input_problems(rows, columns), columns["label"]
        return problems if column is None else problems + check_label_lists(rows, column)

    def labels_of(self, value: Any) -> tuple[str, ...]:
        """Return the labels that are listed."""
        return labels_of(value) or ()

    def learn_used(
        self, config: Any, train: Sequence[Row], state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the weight of rows that have a label, for each label, where they are not 1."""
        if config.class_weights == "none":
            return {}
        indices = indices_of(state)
        counts = [0] * len(state["labels"])
        for row in self.all_labels(train, state["columns"]):
            for label in row:
                counts[indices[label]] += 1
        # A label without rows, or that all rows have, has nothing to be balanced.
        rows = len(train)
        return {"weights": [(rows - n) / n if 0 < n < rows else 1.0 for n in counts]}

    def notes(self, train: Sequence[Row], state: Mapping[str, Any]) -> tuple[str, ...]:
        """Name the labels that train has none of, and tell of rows without labels."""
        empty = sum(not row for row in self.all_labels(train, state["columns"]))
        told = (f"train: {empty:,} of {len(train):,} rows have no label",) if empty else ()
        return (*told, *super().notes(train, state))

    def stratum(self, row: Row, columns: Columns) -> Any:
        """Return the first label, so that a cut does not leave a frequent one out."""
        return next(iter(labels_of(row.values.get(columns["label"] or "")) or ()), None)

    def model_options(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the number and the names of the labels, and that a row may have several."""
        return {**super().model_options(state), "problem_type": "multi_label_classification"}


class MultiLabelClassification(TextFamily, MultiLabelFamily):
    """The family's row in the table."""

    auto_class = "AutoModelForSequenceClassification"
    task_type: str | None = "SEQ_CLS"
    inputs, targets = TEXTS, (LABELS,)

    def build(
        self, config: MultiLabelClassificationConfig, state: Mapping[str, Any], processor: Any
    ) -> MultiLabelTask:
        """Bind the family; `processor` is a tokenizer."""
        reader = TextReader(processor, state["columns"], max_length=config.max_length)
        return MultiLabelTask(config, state, reader)


def _two_ways(column: str) -> Problem:
    return Problem(
        id="data.labels-twice",
        message="`task.data.label_columns` must be left out with task.data.label_column, which "
        f"names a column that lists the labels, but that is {column}.",
        key="task.data.label_columns",
        fix="leave one of them out",
    )


def _other_columns(given: Sequence[str], learned: Sequence[str]) -> Problem:
    return Problem(
        id="data.other-labels",
        message="`task.data.label_columns` must name the labels that the adapter was trained on, "
        f"but is {', '.join(given)}.",
        key="task.data.label_columns",
        allowed=", ".join(learned),
        fix="leave it out where the columns have these names",
    )
