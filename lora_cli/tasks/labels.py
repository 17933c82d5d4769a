"""What the families share whose rows have labels from a fixed set, which is learned from train."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from lora_cli.data.alike import case_notes, check_alike
from lora_cli.data.columns import (
    check_known_labels,
    label_indices,
    label_notes,
    resolve_label_names,
)
from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError
from lora_cli.tasks.contract import Batch, Features
from lora_cli.tasks.rows import Columns, RowFamily, raise_if


class Reader(Protocol):
    """Turns the inputs of rows, whatever they are, into what a model reads."""

    def encode(self, row: Row) -> Features:
        """Encode the inputs of a row; see `lora_cli.tasks.contract.Task.encode`."""

    def collate(self, features: Sequence[Features]) -> Batch:
        """Return what a batch holds besides ids and labels."""

    def inputs(self, batch: Batch, model: Callable[..., Any]) -> Mapping[str, torch.Tensor]:
        """Return the arguments of a model for a batch, rows first, where the model is."""


class LabelledTask(ABC):
    """What the tasks share that give a row labels: labels and the weights of these.

    Attributes:
        feature: Name of the entry of an encoded row that holds what `target_of` returns.
    """

    greater_is_better = True
    couples_rows = False
    feature: str

    def __init__(self, config: Any, state: Mapping[str, Any], reader: Reader) -> None:
        self.metric: str = config.metric
        self._labels: tuple[str, ...] = tuple(state["labels"])
        self._columns: Columns = state["columns"]
        self._indices = indices_of(state)
        weights = state.get("weights")
        self._weights = None if weights is None else torch.tensor(weights)
        self._reader = reader

    @abstractmethod
    def target_of(self, value: Any) -> Any:
        """Return what is to be learned of a value of the label column, as plain values."""

    def encode(self, row: Row) -> Features:
        """Encode a row; the entry `feature` is None where the labels are not known."""
        column = self._columns["label"]
        target = None if column is None else self.target_of(row.values[column])
        return {**self._reader.encode(row), self.feature: target}

    def collate(self, features: Sequence[Features]) -> Batch:
        """Put rows together: what the reader makes of them, and `labels` a row each, or None."""
        labels = [row[self.feature] for row in features]
        known = all(label is not None for label in labels)
        return {
            "ids": [row["id"] for row in features],
            "labels": torch.tensor(labels) if known else None,
            **self._reader.collate(features),
        }

    def _logits(self, model: Callable[..., Any], batch: Batch) -> torch.Tensor:
        """Run the model: float32 of shape (B, C)."""
        logits_BC: torch.Tensor = model(**self._reader.inputs(batch, model)).logits.float()
        return logits_BC

    def _weights_on(self, device: torch.device) -> torch.Tensor | None:
        return None if self._weights is None else self._weights.to(device)


class LabelFamily(RowFamily):
    """A family with one target, whose values are labels.

    The state holds ``labels``, the names in order of the outputs, and ``numbered``, whether 0, 1,
    ... stand for them, besides the columns.
    """

    @abstractmethod
    def labels_of(self, value: Any) -> tuple[str, ...]:
        """Return the labels that a value of the target's column holds; `check_rows` took it."""

    def all_labels(self, rows: Sequence[Row], columns: Columns) -> list[tuple[str, ...]]:
        """Return the labels of each row."""
        column = self._column(columns)
        return [self.labels_of(row.values[column]) for row in rows]

    def learn(
        self, config: Any, train: Sequence[Row], loaded: Loaded, columns: Columns
    ) -> dict[str, Any]:
        """Return ``labels`` and ``numbered``; names come from the user, the data set or train.

        Raises:
            UserError: If train has no two labels, or some that are alike by accident.
        """
        given, declared = config.data.label_names, loaded.class_names.get(self._column(columns))
        found = self.all_labels(train, columns)
        if given is None and declared is None:
            raise_if(check_alike(train, found, self._column(columns)))
        names = resolve_label_names(
            [label for labels in found for label in labels],
            label_names=given,
            class_names=declared,
            column_key=f"task.data.{self.targets[0].name}_column",
        )
        return {"labels": list(names), "numbered": given is not None or declared is not None}

    def check_known(self, rows: Sequence[Row], state: Mapping[str, Any]) -> list[Problem]:
        """Return a problem for labels that train does not have."""
        column = self._column(state["columns"])
        single = [
            Row(row.id, {column: label}, row.source, row.number)
            for row in rows
            for label in sorted(set(self.labels_of(row.values[column])))
        ]
        indices = indices_of(state)
        return check_known_labels(single, column, indices=indices, stated=state["numbered"])

    def rebind(self, config: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Take label names that name the integers of other rows.

        Raises:
            UserError: If they are not those of training, in order.
        """
        names = config.data.label_names
        if names is None:
            return state
        if list(names) != list(state["labels"]):
            raise UserError(other_labels(names, state["labels"]))
        return {**state, "numbered": True}

    def notes(self, train: Sequence[Row], state: Mapping[str, Any]) -> tuple[str, ...]:
        """Name the labels that train has none of, and those that differ in case alone."""
        labels = [label for row in self.all_labels(train, state["columns"]) for label in row]
        absent = label_notes(state["labels"], labels, indices=indices_of(state))
        return (*absent, *case_notes(state["labels"]))

    def count_labels(self, rows: Sequence[Row], state: Mapping[str, Any]) -> dict[str, int]:
        """Return how often each label is there, in the order of the outputs."""
        indices = indices_of(state)
        found = Counter(
            indices[label] for labels in self.all_labels(rows, state["columns"]) for label in labels
        )
        return {name: found[index] for index, name in enumerate(state["labels"])}

    def describe(self, state: Mapping[str, Any]) -> str:
        """Return the number of labels."""
        return f"{len(state['labels'])} labels"

    def model_options(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the number and the names of the labels, for the head and config.json."""
        return label_options(state["labels"])

    def _column(self, columns: Columns) -> str:
        return columns[self.targets[0].name] or ""


def label_options(labels: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a head with an output for each label."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: index for index, name in enumerate(labels)},
    }


def indices_of(state: Mapping[str, Any]) -> dict[str, int]:
    """Return the output of each label that is accepted."""
    return label_indices(state["labels"], numbered=state["numbered"])


def other_labels(given: Sequence[str], trained: Sequence[str]) -> Problem:
    """Refuse label names that are not those of training."""
    return Problem(
        id="data.other-labels",
        message=f"`task.data.label_names` must be the labels that the adapter was trained on, "
        f"in their order, but is {', '.join(given)}.",
        key="task.data.label_names",
        allowed=", ".join(trained),
        fix="leave it out where the rows hold label names",
    )
