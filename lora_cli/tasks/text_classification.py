"""Text classification: one label for each text, or for each pair of texts.

The head is the sequence classification head of transformers, the loss is cross-entropy, summed over
the rows of a batch:  ``loss_sum = -sum_b log softmax(logits_BC[b])[label_b]``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lora_cli.config.sections import DataConfig, TextClassificationConfig
from lora_cli.data.columns import (
    LABEL_COLUMNS,
    TEXT_COLUMNS,
    canonical_label,
    check_known_labels,
    check_labels,
    check_texts,
    label_indices,
    label_notes,
    list_columns,
    resolve_column,
    resolve_label_names,
)
from lora_cli.data.sources import load_rows
from lora_cli.data.splits import choose_splits, limit_rows, overlap_notes
from lora_cli.data.types import Row, Splits
from lora_cli.errors import Problem, UserError
from lora_cli.tasks.contract import Batch, Features, StepOutput


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


class TextClassificationTask:
    """Text classification bound to a configuration, label names and a tokenizer."""

    greater_is_better = True
    couples_rows = False

    def __init__(
        self, config: TextClassificationConfig, state: Mapping[str, Any], tokenizer: Any
    ) -> None:
        self.metric: str = config.metric
        self._max_length = config.max_length
        self._labels: tuple[str, ...] = tuple(state["labels"])
        self._columns: dict[str, str | None] = dict(state["columns"])
        self._indices = _indices(state)
        self._tokenizer = tokenizer

    def encode(self, row: Row) -> Features:
        """Tokenize a row; `truncated` tells whether `task.max_length` cut it."""
        texts = [row.values[column] for column in _text_columns(self._columns)]
        inputs = dict(self._tokenizer(*texts))
        truncated = len(inputs["input_ids"]) > self._max_length
        if truncated:
            inputs = dict(self._tokenizer(*texts, truncation=True, max_length=self._max_length))
        column = self._columns["label"]
        label = None if column is None else canonical_label(row.values[column])
        return {
            "id": row.id,
            "length": len(inputs["input_ids"]),
            "inputs": inputs,
            "label": None if label is None else self._indices[label],
            "truncated": truncated,
        }

    def collate(self, features: Sequence[Features]) -> Batch:
        """Pad to the longest row: `inputs` of shape (B, T), `labels` (B,) or None."""
        labels = [row["label"] for row in features]
        known = all(label is not None for label in labels)
        return {
            "ids": [row["id"] for row in features],
            "inputs": dict(
                self._tokenizer.pad([row["inputs"] for row in features], return_tensors="pt")
            ),
            "labels": torch.tensor(labels) if known else None,
        }

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return the summed cross-entropy, the number of rows and `logits` of shape (B, C)."""
        logits_BC = model(**batch["inputs"]).logits.float()
        labels = batch["labels"]
        if labels is None:
            return StepOutput(logits_BC.new_zeros(()), 0, {"logits": logits_BC})
        smoothing = batch.get("label_smoothing", 0.0)
        loss_sum = functional.cross_entropy(
            logits_BC, labels, reduction="sum", label_smoothing=smoothing
        )
        return StepOutput(loss_sum, len(labels), {"logits": logits_BC})

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


class TextClassification:
    """The family's row in the table."""

    auto_class = "AutoModelForSequenceClassification"
    task_type: str | None = "SEQ_CLS"

    def load(self, config: TextClassificationConfig, *, seed: int) -> Splits:
        """Read, split and check the rows; learn the label names from train."""
        data, loaded = config.data, load_rows(config.data)
        train = loaded.rows.get(data.train_split) or next(iter(loaded.rows.values()))
        columns, notes = _resolve_columns(data, list_columns(train))
        label = columns["label"] or ""
        splits, split_notes = choose_splits(
            loaded.rows, data, seed=seed, label_of=lambda row: row.values.get(label)
        )
        _raise_if(_row_problems(splits.values(), columns))
        train_labels = [str(canonical_label(row.values[label])) for row in splits["train"]]
        class_names = loaded.class_names.get(label)
        state: dict[str, Any] = {
            "labels": list(
                resolve_label_names(
                    train_labels, label_names=data.label_names, class_names=class_names
                )
            ),
            "columns": columns,
            "numbered": data.label_names is not None or class_names is not None,
        }
        _raise_if(_label_problems(splits.values(), state))
        limited, limit_notes = limit_rows(splits, data, seed=seed)
        sizes = ", ".join(f"{len(rows):,} {name}" for name, rows in limited.items())
        return Splits(
            rows=limited,
            state=state,
            notes=(
                *loaded.notes,
                *notes,
                *split_notes,
                *limit_notes,
                *label_notes(state["labels"], train_labels, indices=_indices(state)),
                *overlap_notes(limited, _text_columns(columns)),
                f"data: {data.path}: {sizes} rows, {len(state['labels'])} labels",
            ),
        )

    def load_more(
        self, config: TextClassificationConfig, state: Mapping[str, Any], *, seed: int
    ) -> tuple[Splits, Mapping[str, Any]]:
        """Read and check labelled rows with label names that are known already."""
        data, loaded = config.data, load_rows(config.data, file_split="test")
        columns, notes = _resolve_columns(
            data, list_columns([row for rows in loaded.rows.values() for row in rows])
        )
        bound = {**state, "columns": columns}
        if data.label_names is not None:
            if list(data.label_names) != list(state["labels"]):
                _raise_if([_other_labels(data.label_names, state["labels"])])
            bound["numbered"] = True
        _raise_if(_row_problems(loaded.rows.values(), columns))
        _raise_if(_label_problems(loaded.rows.values(), bound))
        limited, limit_notes = limit_rows(loaded.rows, data, seed=seed, is_training=False)
        return Splits(limited, bound, (*loaded.notes, *notes, *limit_notes)), bound

    def bind_columns(
        self, columns: Sequence[str], state: Mapping[str, Any], *, where: str
    ) -> Mapping[str, Any]:
        """Find the text columns among those of rows to predict; a label is not read."""
        found = dict(state["columns"])
        missing = [column for column in _text_columns(found) if column not in columns]
        if missing == [found["text"]] and found["text_pair"] is None:
            usual = [name for name in TEXT_COLUMNS if name in columns]
            if usual:
                found["text"], missing = usual[0], []
        if missing:
            raise UserError(
                Problem(
                    id="data.missing-column",
                    message=f'The rows must have the column "{missing[0]}", which the adapter '
                    "was trained on, but have not.",
                    where=where,
                    allowed=", ".join(columns),
                    fix=f"rename the column with the text to {missing[0]}",
                )
            )
        return {**state, "columns": {**found, "label": None}}

    def check_row(self, row: Row, state: Mapping[str, Any]) -> None:
        """Refuse a row without text."""
        _raise_if(_row_problems([(row,)], {**state["columns"], "label": None}))

    def model_options(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the number and the names of the labels, for the head and config.json."""
        labels = list(state["labels"])
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {name: index for index, name in enumerate(labels)},
        }

    def build(
        self, config: TextClassificationConfig, state: Mapping[str, Any], processor: Any
    ) -> TextClassificationTask:
        """Bind the family; `processor` is a tokenizer."""
        return TextClassificationTask(config, state, processor)


def _pairs(predictions: Sequence[LabelPrediction]) -> tuple[list[int], list[int]]:
    """Return predicted and true labels of the rows whose label is known."""
    known = [(row.label, row.reference) for row in predictions if row.reference is not None]
    return [label for label, _ in known], [reference for _, reference in known]


def _text_columns(columns: Mapping[str, str | None]) -> list[str]:
    return [name for name in (columns["text"], columns["text_pair"]) if name is not None]


def _indices(state: Mapping[str, Any]) -> dict[str, int]:
    return label_indices(state["labels"], numbered=state["numbered"])


def _resolve_columns(
    data: DataConfig, columns: Sequence[str]
) -> tuple[dict[str, str | None], list[str]]:
    """Return the text, text_pair and label columns, and what was chosen for the user."""
    problems: list[Problem] = []
    found: dict[str, str | None] = {"text_pair": None}
    notes: list[str] = []
    wanted = [("text", data.text_column, TEXT_COLUMNS), ("label", data.label_column, LABEL_COLUMNS)]
    if data.text_pair_column is not None:
        wanted.append(("text_pair", data.text_pair_column, ()))
    for role, name, known in wanted:
        try:
            found[role], note = resolve_column(
                columns, name, known=known, key=f"task.data.{role}_column"
            )
        except UserError as error:
            problems += error.problems
        else:
            notes += [note] if note else []
    _raise_if(problems)
    return found, notes


def _row_problems(
    splits: Iterable[Sequence[Row]], columns: Mapping[str, str | None]
) -> list[Problem]:
    problems = []
    for rows in splits:
        for column in _text_columns(columns):
            problems += check_texts(rows, column)
        if columns["label"] is not None:
            problems += check_labels(rows, columns["label"])
    return problems


def _label_problems(splits: Iterable[Sequence[Row]], state: Mapping[str, Any]) -> list[Problem]:
    column, indices = state["columns"]["label"], _indices(state)
    return [
        problem
        for rows in splits
        for problem in check_known_labels(rows, column, indices=indices, stated=state["numbered"])
    ]


def _other_labels(given: Sequence[str], trained: Sequence[str]) -> Problem:
    return Problem(
        id="data.other-labels",
        message=f"`task.data.label_names` must be the labels that the adapter was trained on, "
        f"in their order, but is {', '.join(given)}.",
        key="task.data.label_names",
        allowed=", ".join(trained),
        fix="leave it out where the rows hold label names",
    )


def _raise_if(problems: Sequence[Problem]) -> None:
    if problems:
        raise UserError(problems)
