"""Data sets of the Hugging Face hub."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_cli.data.cells import table_cells
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError

_KEY = "task.data.path"
_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class HubRows:
    """A hub data set.

    Attributes:
        rows: Split name to its rows.
        class_names: Column to its label names in order, where the data set declares them.
        notes: Splits left out, one sentence each.
    """

    rows: Mapping[str, tuple[Row, ...]]
    class_names: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]


def load_hub_rows(path: str, *, name: str | None, revision: str | None) -> HubRows:
    """Read every split of a hub data set, from the local hub cache where it is there.

    Splits whose declared label is -1 in every row have no labels and are left out, with a note.

    Raises:
        UserError: If the hub cannot be reached and the data set is not cached, or if there is no
            such data set or configuration.
    """
    import datasets

    reachable = _check_exists(path, revision=revision)
    offline_before = datasets.config.HF_HUB_OFFLINE
    # Without this, each file is retried for 20 s before the cache is looked into.
    datasets.config.HF_HUB_OFFLINE = offline_before or not reachable
    try:
        found = datasets.load_dataset(path, name, revision=revision)
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(_unreachable(path)) from error
    except ValueError as error:
        raise UserError(_bad_name(path, name=name, reason=str(error))) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline_before
    return _convert(found, path)


def _check_exists(path: str, *, revision: str | None) -> bool:
    """Return whether the hub answers.

    Raises:
        UserError: If it answers that there is no such data set.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        HfApi().dataset_info(path, revision=revision, timeout=_TIMEOUT_SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        wanted = f'"{path}"' if revision is None else f'"{path}" at revision {revision}'
        message = f"`{_KEY}` must name a file or hub data set, but there is no {wanted}."
        fix = "check the name, or log in with `hf auth login` if the data set is private"
        raise UserError(
            Problem(id="data.no-such-dataset", message=message, key=_KEY, fix=fix)
        ) from error
    # The HTTP library's errors are not OSErrors, and which library it is depends on the version.
    except Exception:  # noqa: BLE001
        return False
    return True


def _unreachable(path: str) -> Problem:
    return Problem(
        id="data.hub-unreachable",
        message=(
            f'`{_KEY}` must name rows that can be read, but the hub cannot be reached and "{path}" '
            "is not in its cache."
        ),
        key=_KEY,
        allowed="a file, a folder of train, validation and test files, or a cached hub data set",
        fix=f"{_KEY}=FILE, or task=movie_reviews for rows that need no hub",
    )


def _bad_name(path: str, *, name: str | None, reason: str) -> Problem:
    first = reason.strip().splitlines()[0][:300].rstrip(".")
    value = "empty" if name is None else f'"{name}"'
    return Problem(
        id="data.bad-dataset-name",
        message=f"`task.data.name` must be a configuration of {path}, but is {value}: {first}.",
        key="task.data.name",
        fix="task.data.name=NAME with one of the names above",
    )


def _convert(found: Any, path: str) -> HubRows:
    import datasets

    rows: dict[str, tuple[Row, ...]] = {}
    class_names: dict[str, tuple[str, ...]] = {}
    notes: list[str] = []
    for split, table in found.items():
        source = f"{path}:{split}"
        declared = {
            column: tuple(item.names)
            for column, feature in table.features.items()
            if isinstance(item := getattr(feature, "feature", feature), datasets.ClassLabel)
        }
        unlabelled = [c for c in declared if len(table) > 0 and all(v == -1 for v in table[c])]
        if unlabelled:
            notes.append(
                f"{split}: left out, {unlabelled[0]} is -1 in all of its {len(table)} rows."
            )
            continue
        class_names |= declared
        media = [
            column
            for column, feature in table.features.items()
            if isinstance(_item(feature), datasets.Image | datasets.Audio)
        ]
        cells = table_cells(table, media)
        others = [column for column in table.features if column not in media]
        plain = table.select_columns(others) if others else [{}] * len(table)
        rows[split] = tuple(
            Row(str(number), {**values, **(cells[number - 1] if cells else {})}, source, number)
            for number, values in enumerate(plain, start=1)
        )
    return HubRows(rows=rows, class_names=class_names, notes=tuple(notes))


def _item(feature: Any) -> Any:
    """Return what a column holds, or what is in the lists that it holds."""
    inner = feature[0] if isinstance(feature, list) and feature else feature
    return getattr(inner, "feature", inner)
