"""The adapter folder: PEFT's files, and beside them what PEFT's format has no place for.

``lora_cli.json`` holds label names and everything else that the task learned, the base model with
the sha256 of its weights, and the resolved configuration: every later command works from the
folder alone.
"""

import json
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_cli.artifacts.commit import commit_folder
from lora_cli.artifacts.peft_format import PeftAdapter, load_peft, peft_files
from lora_cli.errors import Problem, UserError

RECORD = "lora_cli.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterRecord:
    """What `lora_cli.json` says.

    Attributes:
        config: The resolved training configuration as plain values.
        state: What the task learned from its data, such as label names.
        base: Name, revision and sha256 of the base model.
        metrics: Metrics on the validation rows: "split", "rows", "base", "adapter".
    """

    config: Mapping[str, Any]
    state: Mapping[str, Any]
    base: Mapping[str, Any]
    metrics: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What a command was pointed at.

    Attributes:
        adapter: The adapter folder.
        run: The run directory that it belongs to, or None where it stands alone.
    """

    adapter: Path
    run: Path | None


def find_subject(path: str) -> Subject:
    """Find the adapter of a run directory or adapter folder.

    Raises:
        UserError: If there is none.
    """
    folder = Path(path)
    # Unlike `Path.exists`, this says of a name that is too long that it is not there.
    if not os.path.exists(path):  # noqa: PTH110
        raise _not_found(path, "does not exist")
    if (folder / "adapter_config.json").is_file():
        is_in_run = (folder.parent / "config.yaml").is_file() and folder.name == "adapter"
        return Subject(adapter=folder, run=folder.parent if is_in_run else None)
    if (folder / "adapter" / "adapter_config.json").is_file():
        return Subject(adapter=folder / "adapter", run=folder)
    if (folder / "config.yaml").is_file():
        why = "has no adapter yet, since the run ended before its first evaluation"
        recipe, run = shlex.quote(str(folder / "recipe.yaml")), shlex.quote(f"run.dir={folder}")
        raise _not_found(path, why, fix=f"lora-cli train {recipe} {run} --resume")
    raise _not_found(path, "has no adapter_config.json")


def _not_found(
    path: str,
    why: str,
    *,
    fix: str = "give the folder that `lora-cli train` made, such as runs/NAME",
) -> UserError:
    return UserError(
        Problem(
            id="adapter.not-found",
            message=f"`from` must be a run or adapter directory, but {path} {why}.",
            key="from",
            fix=fix,
        )
    )


def save_adapter(
    folder: Path,
    adapter: PeftAdapter,
    record: AdapterRecord,
    *,
    card: str,
    module_names: Iterable[str],
) -> int:
    """Write the adapter folder as a whole and return its size in bytes."""
    document = {
        "format": FORMAT,
        "version": version("lora-cli"),
        "config": record.config,
        "state": record.state,
        "base": record.base,
        "metrics": record.metrics,
    }
    files = {
        **peft_files(adapter, module_names=module_names),
        RECORD: json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n",
        "README.md": card.encode(),
    }
    commit_folder(folder, files, facts={}, manifest=False)
    return sum(len(content) for content in files.values())


def load_adapter(folder: Path) -> tuple[PeftAdapter, AdapterRecord]:
    """Read an adapter folder that lora-cli wrote.

    Raises:
        UserError: If a file is missing, damaged or of a newer format.
    """
    adapter = load_peft(folder)
    path = folder / RECORD
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] > FORMAT:
            raise _unreadable(path, f"it is of format {document['format']}, newer than {FORMAT}")
        record = AdapterRecord(
            config=dict(document["config"]),
            state=dict(document["state"]),
            base=dict(document["base"]),
            metrics=dict(document["metrics"]),
        )
    except FileNotFoundError:
        raise _unreadable(
            path, "it is missing: label names and task are not in PEFT's own files"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"it cannot be read ({type(error).__name__}: {error})"
        raise _unreadable(path, why) from error
    return adapter, record


def _unreadable(path: Path, why: str) -> UserError:
    return UserError(
        Problem(
            id="adapter.record",
            message=f"{RECORD} must say how the adapter was trained, but {why}.",
            where=str(path),
            fix="use an adapter folder as `lora-cli train` wrote it",
        )
    )
