"""One label for each row, of whatever kind its input is.

The loss is cross-entropy, summed over the rows of a batch with the weights of their labels, which
are 1 unless set: ``loss_sum = -sum_b weight[label_b] log softmax(logits_BC[b])[label_b]``,
``count = sum_b weight[label_b]``.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lora_cli.data.columns import canonical_label, check_labels
from lora_cli.data.types import Row
from lora_cli.errors import Problem
from lora_cli.tasks.contract import Batch, StepOutput
from lora_cli.tasks.labels import LabelFamily, LabelledTask, indices_of
from lora_cli.tasks.rows import Columns


@dataclass(frozen=True, slots=True)
class LabelPrediction:
    """The label of one row.

    Attributes:
        id: Row id.
        label: Index of the most probable label.
        probabilities: One for each label, in label order; they sum to 1.
        reference: Index of the true label, or None where it is not known.
    """

    id: str
    label: int
    probabilities: tuple[float, ...]
    reference: int | None


class SingleLabelTask(LabelledTask):
    """A task with one label a row, bound to a configuration, label names and a reader."""

    feature = "label"

    def target_of(self, value: Any) -> int | None:
        """Return the index of the label."""
        label = canonical_label(value)
        return None if label is None else self._indices[label]

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return the weighted cross-entropy, the sum of weights and `logits` of shape (B, C)."""
        logits_BC = self._logits(model, batch)
        labels = batch["labels"]
        if labels is None:
            return StepOutput(logits_BC.new_zeros(()), 0, {"logits": logits_BC})
        weights = self._weights_on(logits_BC.device)
        loss_sum = functional.cross_entropy(
            logits_BC,
            labels,
            weights,
            reduction="sum",
            label_smoothing=batch.get("label_smoothing", 0.0),
        )
        count = len(labels) if weights is None else float(weights[labels].sum())
        return StepOutput(loss_sum, count, {"logits": logits_BC})

    def decode(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> list[LabelPrediction]:
        """Turn logits into labels and probabilities."""
        probabilities_BC = outputs["logits"].cpu().double().softmax(dim=-1)
        labels = batch["labels"]
        references = [None] * len(batch["ids"]) if labels is None else labels.tolist()
        return [
            LabelPrediction(row_id, max(range(len(row)), key=row.__getitem__), tuple(row), true)
            for row_id, row, true in zip(
                batch["ids"], probabilities_BC.tolist(), references, strict=True
            )
        ]

    def metrics(self, predictions: Sequence[LabelPrediction]) -> dict[str, float]:
        """Return accuracy, macro_f1 and matthews_correlation."""
        from lora_cli.metrics.classification import classification_metrics

        predicted, true = _pairs(predictions)
        return classification_metrics(predicted, true, num_classes=len(self._labels))

    def report(self, predictions: Sequence[LabelPrediction]) -> dict[str, Any]:
        """Return label names, scores by class and their averages, and the confusion matrix."""
        from lora_cli.metrics.classification import class_report, confusion_matrix

        predicted, true = _pairs(predictions)
        return {
            "labels": list(self._labels),
            **class_report(predicted, true, num_classes=len(self._labels)),
            "confusion": confusion_matrix(predicted, true, num_classes=len(self._labels)).tolist(),
        }

    def to_json(self, prediction: LabelPrediction) -> dict[str, Any]:
        """Return id, label name and the probability of each label, and the true label if known."""
        line: dict[str, Any] = {
            "id": prediction.id,
            "label": self._labels[prediction.label],
            "probabilities": dict(zip(self._labels, prediction.probabilities, strict=True)),
        }
        if prediction.reference is not None:
            line["reference"] = self._labels[prediction.reference]
        return line


class SingleLabelFamily(LabelFamily):
    """A family with one label a row."""

    @abstractmethod
    def input_problems(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Return what is wrong with the inputs of these rows."""

    def check_rows(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse rows whose input cannot be read, and labels that are none."""
        problems, column = self.input_problems(rows, columns), columns["label"]
        return problems if column is None else problems + check_labels(rows, column)

    def labels_of(self, value: Any) -> tuple[str, ...]:
        """Return the one label."""
        return (str(canonical_label(value)),)

    def learn_used(
        self, config: Any, train: Sequence[Row], state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the weight of each label, where they are not all 1."""
        if config.class_weights == "none":
            return {}
        indices, labels = indices_of(state), state["labels"]
        counts = Counter(indices[label] for (label,) in self.all_labels(train, state["columns"]))
        # A label without rows has no loss, whatever its weight.
        scale = len(train) / len(labels)
        return {"weights": [scale / counts[i] if counts[i] else 1.0 for i in range(len(labels))]}

    def stratum(self, row: Row, columns: Columns) -> Any:
        """Return the label."""
        return row.values.get(columns["label"] or "")


def _pairs(predictions: Sequence[LabelPrediction]) -> tuple[list[int], list[int]]:
    """Return predicted and true labels of the rows whose label is known."""
    known = [(row.label, row.reference) for row in predictions if row.reference is not None]
    return [label for label, _ in known], [reference for _, reference in known]
