"""The adapter folder: PEFT's files, and beside them what PEFT's format has no place for.

What PEFT cannot load, such as biases or whole blocks, is in ``tuned.safetensors`` instead, and
there is no ``adapter_config.json`` then that would promise otherwise.

``lora_cli.json`` holds label names and everything else that the task learned, the base model with
the sha256 of its weights, and the resolved configuration: every later command works from the
folder alone. It holds the sha256 of itself and of the other files too, but for the card, which may
be edited.
"""

import json
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_cli.artifacts.commit import (
    DamagedFolderError,
    check_file,
    commit_folder,
    describe_files,
    document_sha256,
)
from lora_cli.artifacts.foreign_marks import is_foreign
from lora_cli.artifacts.peft_format import PeftAdapter, load_peft, peft_files
from lora_cli.artifacts.peft_prefix import is_prefix, load_prefix, prefix_files
from lora_cli.artifacts.tuned import TUNED_FILE, Tuned, load_tuned, tuned_files
from lora_cli.errors import Problem, UserError

RECORD = "lora_cli.json"
FORMAT = 1
# In the run directory: the base model that the run made by merging an earlier adapter.
MERGED_BASE = "base"
# Low-rank updates, or what any other strategy has trained.
Adapter = PeftAdapter | Tuned
_MARKS = ("adapter_config.json", TUNED_FILE)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterRecord:
    """What `lora_cli.json` says.

    Attributes:
        config: The resolved training configuration as plain values.
        state: What the task learned from its data, such as label names.
        base: Name, revision and sha256 of the base model; "folder" where it is `MERGED_BASE` in
            the run directory, and "merged" what it was made from.
        metrics: Metrics on the validation rows: "split", "rows", "base", "adapter"; empty for an
            adapter that was combined from others.
        combined: What it was combined from and how; empty for one that was trained.
        tensors_sha256: Hash of the tensors as they were trained, by which a resumed run knows its
            best adapter; None for one that was combined.
    """

    config: Mapping[str, Any]
    state: Mapping[str, Any]
    base: Mapping[str, Any]
    metrics: Mapping[str, Any]
    combined: Mapping[str, Any] = field(default_factory=dict)
    tensors_sha256: str | None = None


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
    if folder.is_dir() and is_foreign(folder):
        raise _foreign(path)
    if _is_adapter(folder):
        is_in_run = (folder.parent / "config.yaml").is_file() and folder.name == "adapter"
        return Subject(adapter=folder, run=folder.parent if is_in_run else None)
    if _is_adapter(folder / "adapter"):
        return Subject(adapter=folder / "adapter", run=folder)
    if (folder / "config.yaml").is_file():
        why = "has no adapter yet, since the run ended before its first evaluation"
        recipe, run = shlex.quote(str(folder / "recipe.yaml")), shlex.quote(f"run.dir={folder}")
        raise _not_found(path, why, fix=f"lora-cli train {recipe} {run} --resume")
    if is_foreign(folder):
        raise _foreign(path)
    raise _not_found(path, f"has no {' or '.join(_MARKS)}")


def _is_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _MARKS)


def _foreign(path: str) -> UserError:
    convert = shlex.join(["lora-cli", "convert", f"adapter={path}", "base=DIR", "output=DIR"])
    return _not_found(path, "is in the format of another program", fix=convert)


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
    adapter: Adapter,
    record: AdapterRecord,
    *,
    card: str,
    module_names: Iterable[str],
) -> int:
    """Write the adapter folder as a whole and return its size in bytes."""
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": version("lora-cli"),
        "config": record.config,
        "state": record.state,
        "base": record.base,
        "metrics": record.metrics,
        "tensors_sha256": record.tensors_sha256,
    }
    if record.combined:
        document["combined"] = record.combined
    tensors = _adapter_files(adapter, module_names)
    document["files"] = describe_files(tensors)
    document["sha256"] = document_sha256(document)
    files = {
        **tensors,
        RECORD: json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n",
        "README.md": card.encode(),
    }
    commit_folder(folder, files, facts={}, manifest=False)
    return sum(len(content) for content in files.values())


def _adapter_files(adapter: Adapter, module_names: Iterable[str]) -> dict[str, bytes]:
    if isinstance(adapter, PeftAdapter):
        return peft_files(adapter, module_names=module_names)
    return tuned_files(adapter) if adapter.prefix is None else prefix_files(adapter, adapter.prefix)


def load_adapter(folder: Path) -> tuple[Adapter, AdapterRecord]:
    """Read an adapter folder that lora-cli wrote.

    Raises:
        UserError: If a file is missing, damaged or of a newer format.
    """
    adapter = _load_tensors(folder)
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
            combined=dict(document.get("combined", {})),
            tensors_sha256=document.get("tensors_sha256"),
        )
        if document_sha256(document) != document["sha256"]:
            raise _unreadable(path, "it does not match its own sha256")
        for name, entry in document["files"].items():
            check_file(folder, name, entry)
    except FileNotFoundError:
        raise _unreadable(
            path, "it is missing: label names and task are not in PEFT's own files"
        ) from None
    except DamagedFolderError as error:
        raise UserError(
            Problem(
                id="adapter.changed",
                message=f"The adapter in {folder} must be as it was written, but {error}.",
                where=str(folder),
                fix="copy the whole folder again",
            )
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        why = f"it cannot be read ({type(error).__name__}: {error})"
        raise _unreadable(path, why) from error
    return adapter, record


def _load_tensors(folder: Path) -> Adapter:
    if is_prefix(folder):
        return load_prefix(folder)
    has_config = (folder / "adapter_config.json").is_file()
    if (folder / TUNED_FILE).is_file() and not has_config:
        return load_tuned(folder)
    return load_peft(folder)


def _unreadable(path: Path, why: str) -> UserError:
    return UserError(
        Problem(
            id="adapter.record",
            message=f"{RECORD} must say how the adapter was trained, but {why}.",
            where=str(path),
            fix="use an adapter folder as `lora-cli train` wrote it",
        )
    )
