"""What the families share whose rows have an image or a sound in a file of its own.

Only the place of a file goes through loading, encoding and batches: it is opened once when it is
encoded, to know that it can be read, and again in each forward pass. So memory holds the files of
one batch, whatever the size of the data.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_cli import packages
from lora_cli.config.tasks import DataConfig
from lora_cli.data.columns import list_columns, resolve_column
from lora_cli.data.media import UnreadableError, list_places, read_media
from lora_cli.data.sources import Loaded, load_rows
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError
from lora_cli.tasks.contract import Batch, Features
from lora_cli.tasks.rows import Columns, Role, RowFamily, raise_if


class MediaFamily(RowFamily):
    """Rows with a file; put before the family that says what is learned of them.

    Attributes:
        kind: "image" or "audio"; the name of the role and of its usual column.
        module: What decodes the files.
        extra: What installs it.
    """

    kind: str
    module: str
    extra: str

    @property
    def media(self) -> Role:
        """The role of the files."""
        return next(role for role in self.inputs if role.name == self.kind)

    @property
    def files(self) -> tuple[Role, ...]:
        """All roles whose values are files."""
        return (self.media,)

    def find(self, data: DataConfig, *, file_split: str = "train") -> Loaded:
        """Read the rows; a folder may hold the files themselves, by label.

        Raises:
            UserError: If the extra is not installed, or as `load_rows`.
        """
        packages.check_extra(self.module, extra=self.extra, needed_by=f"A data set of {self.kind}")
        return load_rows(data, file_split=file_split, layouts=self.layouts, media=self.kind)

    def suit(
        self, data: DataConfig, loaded: Loaded, *, state: Mapping[str, Any] | None = None
    ) -> tuple[DataConfig, Loaded]:
        """Put the place of its file into each row, with size and time of change.

        Raises:
            UserError: If files are missing; all splits together.
        """
        data, loaded = super().suit(data, loaded, state=state)
        errors = []
        for role in self.files:
            try:
                loaded = _with_places(data, loaded, role)
            except UnreadableError as error:
                errors.append(error)
        if len(errors) == 1:
            raise errors[0]
        raise_if(problem for error in errors for problem in error.problems)
        return data, loaded

    def input_problems(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse rows whose file is not there."""
        _, faults = list_places(rows, columns[self.kind] or "")
        return list(UnreadableError(self.kind, faults).problems) if faults else []


def _with_places(data: DataConfig, loaded: Loaded, role: Role) -> Loaded:
    """Return the rows with the places of the files of a role.

    Raises:
        UnreadableError: If there are files that are not there.
    """
    columns = list_columns([row for rows in loaded.rows.values() for row in rows])
    named, key = getattr(data, f"{role.name}_column"), f"task.data.{role.name}_column"
    try:
        column, _ = resolve_column(columns, named, known=role.known, key=key)
    except UserError:
        # It is reported with the other columns.
        return loaded
    found, faults = {}, []
    for split, rows in loaded.rows.items():
        places, missing = list_places(rows, column)
        faults += missing
        found[split] = tuple(
            replace(row, values={**row.values, column: place})
            for row, place in zip(rows, places, strict=True)
        )
    if faults:
        raise UnreadableError(role.name, faults)
    return replace(loaded, rows=found)


class MediaReader(ABC):
    """Reads the file of a row with a processor of transformers; see `lora_cli.tasks.labels.Reader`.

    Attributes:
        kind: "image" or "audio".
    """

    kind: str

    def __init__(self, processor: Any, columns: Columns) -> None:
        self._processor, self._column = processor, columns[self.kind] or ""

    @property
    def column(self) -> str:
        """The column of the files."""
        return self._column

    @abstractmethod
    def describe(self, content: bytes) -> Features:
        """Return what the report tells of a file, and `length` if files differ in cost.

        Raises MediaError if the file cannot be read as a whole.
        """

    @abstractmethod
    def process(
        self, places: Sequence[Mapping[str, Any]], ids: Sequence[str], *, seed: int | None
    ) -> Mapping[str, torch.Tensor]:
        """Decode files and return the arguments of the model.

        Args:
            places: See `lora_cli.data.media`.
            ids: Of the rows.
            seed: Of the step, in training; None elsewhere, where nothing is drawn.
        """

    def encode(self, row: Row) -> Features:
        """Open the file and keep its place.

        Raises:
            UnreadableError: If it cannot be read.
        """
        place, facts = read_media(row, self._column, self.kind, self.describe)
        return {"id": row.id, "place": place, "length": 1, "cut": 0, "supervised": 1, **facts}

    def collate(self, features: Sequence[Features]) -> Batch:
        """Put the places together."""
        return {"places": [row["place"] for row in features]}

    def inputs(self, batch: Batch, model: Callable[..., Any]) -> Mapping[str, torch.Tensor]:
        """Decode the files of a batch, and put them where the model is, in its number format."""
        found = self.process(batch["places"], batch["ids"], seed=batch.get("seed"))
        return like_model(found, model)


def like_model(
    tensors: Mapping[str, torch.Tensor], model: Callable[..., Any]
) -> Mapping[str, torch.Tensor]:
    """Return inputs where a model is, in its number format."""
    device, dtype = torch.device("cpu"), getattr(model, "dtype", torch.float32)
    if isinstance(model, nn.Module):
        device = next(model.parameters()).device
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    }
