"""What families share whose rows have inputs and targets in columns: finding, checking, cutting."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_cli.config.tasks import DataConfig
from lora_cli.data.columns import list_columns, resolve_column
from lora_cli.data.files import DATA_LAYOUTS
from lora_cli.data.groups import Groups
from lora_cli.data.made_up import text
from lora_cli.data.repeats import repeat_notes, repeated_rows
from lora_cli.data.sources import Loaded, load_rows
from lora_cli.data.splits import choose_splits, limit_rows, without_empty
from lora_cli.data.types import Row, Splits
from lora_cli.errors import Problem, UserError
from lora_cli.models.sources import ModelSource
from lora_cli.tasks.contract import Features

Columns = Mapping[str, str | None]

_SPLIT_SETTINGS = ("train_split", "validation_split", "test_split")


@dataclass(frozen=True, slots=True)
class Role:
    """Something that a family reads from a column.

    Attributes:
        name: What it is; the setting ``task.data.<name>_column`` names its column.
        known: Usual names of the column, best first.
        optional: Whether there may be none: unless the user names one, or a usual name is there.
        made_up: Gives what a made-up row holds, from the settings and its number.
    """

    name: str
    known: tuple[str, ...] = ()
    optional: bool = False
    made_up: Callable[[Any, int], Any] = text


class RowFamily(ABC):
    """A family whose rows are read from columns; `lora_cli.tasks.contract.Family` says the rest.

    The state of its tasks holds ``columns``, by role, besides what the family learns.

    Attributes:
        inputs: What is read of every row.
        targets: What is to be learned; not read of rows that are predicted.
        layouts: Of the files that rows with targets can be in.
        processor: What turns rows into inputs of the model.
    """

    inputs: tuple[Role, ...]
    targets: tuple[Role, ...]
    layouts: tuple[str, ...] = DATA_LAYOUTS
    processor = "tokenizer"

    @abstractmethod
    def check_rows(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Return what is wrong with the values of these rows; a role without a column is not read.

        A target is not read where its column is None.
        """

    @abstractmethod
    def learn(self, config: Any, train: Sequence[Row], loaded: Loaded, columns: Columns) -> Any:
        """Return what the task must know from all rows of train, as a dict of JSON values.

        Raises UserError if nothing can be learned from them.
        """

    @abstractmethod
    def describe(self, state: Mapping[str, Any]) -> str:
        """Say in a few words what was learned, such as the number of labels."""

    def made_up_rows(self, config: Any, count: int) -> list[dict[str, Any]]:
        """Return rows with the columns of the settings, for data that cannot be reached."""
        roles = {}
        for role in (*self.inputs, *self.targets):
            column = getattr(config.data, f"{role.name}_column") or next(iter(role.known), None)
            if column is not None:
                roles[column] = role
        rows = (
            {column: role.made_up(config, number) for column, role in roles.items()}
            for number in range(count)
        )
        return [{name: value for name, value in row.items() if value is not None} for row in rows]

    def check_known(self, rows: Sequence[Row], state: Mapping[str, Any]) -> list[Problem]:
        """Return a problem for targets that the state does not know of."""
        del rows, state
        return []

    def learn_used(self, config: Any, train: Sequence[Row], state: Mapping[str, Any]) -> Any:
        """Return what follows from the rows that are trained on, after any limit on their number.

        These are JSON values too, by name.
        """
        del config, train, state
        return {}

    def notes(self, train: Sequence[Row], state: Mapping[str, Any]) -> tuple[str, ...]:
        """Return sentences about what train lacks."""
        del train, state
        return ()

    def start_head(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Leave the random values of a new head as they are."""
        del model, state

    def check_head(self, source: ModelSource, state: Mapping[str, Any]) -> tuple[bool, str]:
        """Take a head of the right size for the task's: other labels are refused in loading."""
        del source, state
        return True, ""

    def fit_model(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Leave a model that was just loaded as it is."""
        del model, state

    def fit_processor(self, processor: Any, state: Mapping[str, Any]) -> Any:
        """Return the processor as it was loaded."""
        del state
        return processor

    def count_labels(self, rows: Sequence[Row], state: Mapping[str, Any]) -> dict[str, int]:
        """Return how often each label is there; nothing where targets are no labels."""
        del rows, state
        return {}

    def arrange(
        self, config: Any, features: Sequence[Features], model: nn.Module
    ) -> tuple[Sequence[Features], tuple[str, ...]]:
        """Leave encoded training rows as they are."""
        del config, model
        return features, ()

    def stratum(self, row: Row, columns: Columns) -> Any:
        """Return what a cut of train is balanced by, compared as text."""
        del row, columns
        return None

    def groups(self, columns: Columns) -> Groups | None:
        """Return which rows are evaluated together, if any are."""
        del columns
        return None

    def input_columns(self, columns: Columns) -> list[str]:
        """Return the columns that make two rows the same where they are alike."""
        return read_columns(self.inputs, columns)

    def check_evaluated(self, config: Any, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Return what is wrong with the rows of a split only for evaluating them."""
        del config, rows, columns
        return []

    def find(self, data: DataConfig, *, file_split: str = "train") -> Loaded:
        """Read the rows; those of a single file are the split `file_split`."""
        return load_rows(data, file_split=file_split, layouts=self.layouts)

    def suit(
        self, data: DataConfig, loaded: Loaded, *, state: Mapping[str, Any] | None = None
    ) -> tuple[DataConfig, Loaded]:
        """Return settings and rows with a column for each role, where the data have it otherwise.

        Args:
            data: Where the rows are.
            loaded: As found.
            state: What was learned from others, if the rows are not for training.
        """
        del state
        return data, loaded

    def load(self, config: Any, *, seed: int) -> Splits:
        """Read, split and check the rows; learn the state from train."""
        data, loaded = self.suit(config.data, self.find(config.data))
        train = loaded.rows.get(data.train_split) or next(iter(loaded.rows.values()))
        columns, notes = self._resolve(data, list_columns(train))
        known, known_notes = self._with_targets(loaded, columns)
        named = {f"task.data.{name}": getattr(data, name) for name in _SPLIT_SETTINGS}
        known = without_empty(known, known_notes, named=named)
        splits, split_notes = choose_splits(
            known,
            data,
            seed=seed,
            label_of=lambda row: self.stratum(row, columns),
            groups=self.groups(columns),
        )
        raise_if(p for rows in splits.values() for p in self.check_rows(rows, columns))
        learned = self.learn(config, splits["train"], loaded, columns)
        state = {"columns": columns, **learned}
        raise_if(p for rows in splits.values() for p in self.check_known(rows, state))
        raise_if(self._check_evaluated(config, splits, columns))
        limited, limit_notes = limit_rows(splits, data, seed=seed, groups=self.groups(columns))
        state |= self.learn_used(config, limited["train"], state)
        sizes = ", ".join(f"{len(rows):,} {name}" for name, rows in limited.items())
        learned_text = self.describe(state)
        repeated = repeated_rows(limited, self.input_columns(columns))
        return Splits(
            rows=limited,
            state=state,
            repeated=repeated,
            notes=(
                *loaded.notes,
                *notes,
                *known_notes,
                *split_notes,
                *limit_notes,
                *self.notes(splits["train"], state),
                *repeat_notes(limited, repeated),
                f"data: {data.path}: {sizes} rows" + (learned_text and f", {learned_text}"),
            ),
        )

    def load_more(
        self, config: Any, state: Mapping[str, Any], *, seed: int
    ) -> tuple[Splits, Mapping[str, Any]]:
        """Read and check rows with targets, given a state that was learned from others."""
        found = self.find(config.data, file_split="test")
        data, loaded = self.suit(config.data, found, state=state)
        columns, notes = self._resolve(
            data, list_columns([row for rows in loaded.rows.values() for row in rows])
        )
        known, known_notes = self._with_targets(loaded, columns)
        known = without_empty(known, known_notes, named={})
        bound = self.rebind(config, {**state, "columns": columns})
        raise_if(p for rows in known.values() for p in self.check_rows(rows, columns))
        raise_if(p for rows in known.values() for p in self.check_known(rows, bound))
        raise_if(self._check_evaluated(config, known, columns))
        limited, limit_notes = limit_rows(
            known, data, seed=seed, is_training=False, groups=self.groups(columns)
        )
        return Splits(limited, bound, (*loaded.notes, *notes, *known_notes, *limit_notes)), bound

    def rebind(self, config: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the state as the settings of other rows than those of training change it."""
        del config
        return state

    def bind_columns(
        self, columns: Sequence[str], state: Mapping[str, Any], *, where: str
    ) -> Mapping[str, Any]:
        """Find the inputs among the columns of rows to predict; targets are not read.

        The only input of a family may also be in a column of another usual name.
        """
        found = dict(state["columns"])
        wanted = [role for role in self.inputs if found[role.name] is not None]
        missing = [role for role in wanted if found[role.name] not in columns]
        if missing and len(wanted) == 1:
            usual = [name for name in missing[0].known if name in columns]
            if usual:
                found[missing[0].name], missing = usual[0], []
        if missing:
            name = found[missing[0].name]
            what = missing[0].name.replace("_", " ")
            raise UserError(
                Problem(
                    id="data.missing-column",
                    message=f'The rows must have the column "{name}", which the adapter '
                    "was trained on, but have not.",
                    where=where,
                    allowed=", ".join(columns),
                    fix=f"rename the column with the {what} to {name}",
                )
            )
        return {**state, "columns": {**found, **{role.name: None for role in self.targets}}}

    def check_row(self, row: Row, state: Mapping[str, Any]) -> None:
        """Refuse a row whose inputs cannot be read."""
        unread = {role.name: None for role in self.targets}
        raise_if(self.check_rows((row,), {**state["columns"], **unread}))

    def _check_evaluated(
        self, config: Any, splits: Mapping[str, Sequence[Row]], columns: Columns
    ) -> list[Problem]:
        evaluated = [rows for split, rows in splits.items() if split != "train"]
        return [p for rows in evaluated for p in self.check_evaluated(config, rows, columns)]

    def _with_targets(
        self, loaded: Loaded, columns: Columns
    ) -> tuple[dict[str, tuple[Row, ...]], list[str]]:
        """Leave out rows with -1 in a column whose label names the data set declares.

        It stands for a row without a label there, such as one that annotators did not agree on.
        """
        declared = [c for c in read_columns(self.targets, columns) if c in loaded.class_names]
        known, notes = {}, []
        for split, rows in loaded.rows.items():
            kept = tuple(row for row in rows if all(row.values.get(c) != -1 for c in declared))
            known[split] = kept
            if len(kept) < len(rows):
                notes.append(
                    f"{split}: left out {len(rows) - len(kept):,} of {len(rows):,} rows, which "
                    f"have no label ({', '.join(declared)} is -1)"
                )
        return known, notes

    def _resolve(self, data: DataConfig, columns: Sequence[str]) -> tuple[Columns, list[str]]:
        """Return the column of each role, and what was chosen for the user."""
        problems: list[Problem] = []
        found: dict[str, str | None] = {}
        notes: list[str] = []
        for role in (*self.inputs, *self.targets):
            name: str | None = getattr(data, f"{role.name}_column")
            folded = {column.casefold() for column in columns}
            if role.optional and name is None and not folded.intersection(role.known):
                found[role.name] = None
                continue
            key = f"task.data.{role.name}_column"
            try:
                found[role.name], note = resolve_column(columns, name, known=role.known, key=key)
            except UserError as error:
                problems += error.problems
            else:
                notes += [note] if note else []
        raise_if(problems)
        return found, notes


def read_columns(roles: Iterable[Role], columns: Columns) -> list[str]:
    """Return the columns that are there for some roles, in their order."""
    return [column for role in roles if (column := columns[role.name]) is not None]


def without_blank(loaded: Loaded, column: str) -> tuple[dict[str, tuple[Row, ...]], list[str]]:
    """Return the rows without blank texts, which files of running text have between paragraphs.

    The second value is a sentence for each split that had some.
    """
    kept, notes = {}, []
    for split, rows in loaded.rows.items():
        kept[split] = tuple(
            row
            for row in rows
            if not isinstance(text := row.values.get(column), str) or text.strip()
        )
        if len(kept[split]) < len(rows):
            left_out = len(rows) - len(kept[split])
            notes.append(f"{split}: left out {left_out:,} of {len(rows):,} rows, with no text")
    return kept, notes


def raise_if(problems: Iterable[Problem]) -> None:
    """Raise UserError with these problems, if there are any."""
    if found := list(problems):
        raise UserError(found)
