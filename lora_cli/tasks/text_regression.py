"""Text regression: a number for each text, or for each pair of texts.

The head is the sequence classification head of transformers with one output, the loss the squared
difference, summed over rows: ``loss_sum = sum_b (output_b - number_b)^2``. Numbers are learned as
they are; the output begins at their mean, and numbers that are spread much
wider than 1 need more steps or another unit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lora_cli.config.tasks import TextRegressionConfig
from lora_cli.data.columns import check_numbers, number_of
from lora_cli.data.made_up import score
from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError
from lora_cli.models.heads import head_names
from lora_cli.tasks.contract import Batch, Features, StepOutput
from lora_cli.tasks.rows import Columns, Role, RowFamily
from lora_cli.tasks.texts import TEXTS, encode_texts, pad_inputs, text_problems

NUMBER_COLUMNS = ("score", "label", "target", "rating", "stars", "value", "similarity")


@dataclass(frozen=True, slots=True)
class NumberPrediction:
    """The number of one row.

    Attributes:
        id: Row id.
        value: What the model says.
        reference: The true number, or None where it is not known.
    """

    id: str
    value: float
    reference: float | None


class TextRegressionTask:
    """Text regression bound to a configuration, columns and a tokenizer."""

    couples_rows = False

    def __init__(
        self, config: TextRegressionConfig, state: Mapping[str, Any], tokenizer: Any
    ) -> None:
        self.metric: str = config.metric
        self.greater_is_better = config.metric != "mse"
        self._max_length = config.max_length
        self._columns: Columns = state["columns"]
        self._tokenizer = tokenizer

    def encode(self, row: Row) -> Features:
        """Tokenize a row; `number` is None where it is not known."""
        column = self._columns["label"]
        number = None if column is None else number_of(row.values[column])
        features = encode_texts(row, self._columns, self._tokenizer, max_length=self._max_length)
        return {**features, "number": number}

    def collate(self, features: Sequence[Features]) -> Batch:
        """Pad to the longest row: `inputs` of shape (B, T), `numbers` (B,) or None.

        `references` are the same numbers as a list, and not rounded.
        """
        numbers = [row["number"] for row in features]
        known = all(number is not None for number in numbers)
        return {
            "ids": [row["id"] for row in features],
            "inputs": pad_inputs(self._tokenizer, features),
            "numbers": torch.tensor(numbers) if known else None,
            "references": numbers,
        }

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return the squared differences, the number of rows and `logits` of shape (B, 1)."""
        logits_B1 = model(**batch["inputs"]).logits.float()
        numbers_B = batch["numbers"]
        if numbers_B is None:
            return StepOutput(logits_B1.new_zeros(()), 0, {"logits": logits_B1})
        loss_sum = functional.mse_loss(logits_B1.squeeze(-1), numbers_B, reduction="sum")
        return StepOutput(loss_sum, len(numbers_B), {"logits": logits_B1})

    def decode(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> list[NumberPrediction]:
        """Turn outputs into numbers."""
        values = outputs["logits"].squeeze(-1).tolist()
        return [
            NumberPrediction(row_id, value, true)
            for row_id, value, true in zip(batch["ids"], values, batch["references"], strict=True)
        ]

    def metrics(self, predictions: Sequence[NumberPrediction]) -> dict[str, float]:
        """Return pearson, spearman and mse."""
        from lora_cli.metrics.regression import regression_metrics

        known = [(p.value, p.reference) for p in predictions if p.reference is not None]
        return regression_metrics([value for value, _ in known], [true for _, true in known])

    def report(self, predictions: Sequence[NumberPrediction]) -> dict[str, Any]:
        """Return nothing: there are no classes."""
        del predictions
        return {}

    def to_json(self, prediction: NumberPrediction) -> dict[str, Any]:
        """Return id and number, and the true number if it is known."""
        line: dict[str, Any] = {"id": prediction.id, "value": prediction.value}
        if prediction.reference is not None:
            line["reference"] = prediction.reference
        return line


class TextRegression(RowFamily):
    """The family's row in the table."""

    auto_class = "AutoModelForSequenceClassification"
    task_type: str | None = "SEQ_CLS"
    inputs, targets = TEXTS, (Role("label", NUMBER_COLUMNS, made_up=score),)

    def check_rows(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse rows without text, and values that are no finite numbers."""
        problems, column = text_problems(rows, columns), columns["label"]
        return problems if column is None else problems + check_numbers(rows, column)

    def learn(
        self, config: TextRegressionConfig, train: Sequence[Row], loaded: Loaded, columns: Columns
    ) -> dict[str, Any]:
        """Return the smallest and the largest number of train, and their mean.

        Raises:
            UserError: If all of them are equal.
        """
        del config, loaded
        column = columns["label"] or ""
        numbers = [number_of(row.values[column]) or 0.0 for row in train]
        low, high = min(numbers), max(numbers)
        if low == high:
            raise UserError(
                Problem(
                    id="data.one-number",
                    message=f"`train` must hold at least two different numbers, but has only "
                    f"{low:g}.",
                    key="task.data.label_column",
                    fix="check task.data.label_column and task.data.train_split",
                )
            )
        return {"low": low, "high": high, "mean": math.fsum(numbers) / len(numbers)}

    def describe(self, state: Mapping[str, Any]) -> str:
        """Return the range of the numbers."""
        return f"numbers from {state['low']:g} to {state['high']:g}, mean {state['mean']:.4g}"

    def model_options(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return that there is one output, a number."""
        del state
        return {"num_labels": 1, "problem_type": "regression"}

    def start_head(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Let the output begin at the mean of train, which is far from 0 more often than not."""
        for name in head_names(model):
            for layer in model.get_submodule(name).modules():
                if not isinstance(layer, nn.Linear) or layer.out_features != 1:
                    continue
                if layer.bias is not None:
                    nn.init.constant_(layer.bias, state["mean"])

    def build(
        self, config: TextRegressionConfig, state: Mapping[str, Any], processor: Any
    ) -> TextRegressionTask:
        """Bind the family; `processor` is a tokenizer."""
        return TextRegressionTask(config, state, processor)
