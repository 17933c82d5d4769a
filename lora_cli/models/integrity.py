"""Whether the files beside a base model's weights are what they were. Does not import torch.

A merged model is written with a list of its files, ``MANIFEST.json``, which is compared whenever
the folder is opened. Of every base the settings and the tokenizer are hashed: with others, the same
weights say something else.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lora_cli.errors import Problem
from lora_cli.models.weights import hash_file

MANIFEST = "MANIFEST.json"
_MAKER = "lora-cli"
# Where there is a tokenizer.json, transformers reads no vocabulary beside it.
_WHOLE_TOKENIZER = "tokenizer.json"
_VOCABULARIES = (
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "target_vocab.json",
    "normalizer.json",
)
_SETTINGS = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
)
# Whoever saves a model again leaves other values in these, which decide nothing.
_IDLE = frozenset({"transformers_version", "_name_or_path", "name_or_path"})


def hash_settings(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file besides the weights that decides what a model says.

    Settings are hashed by their values: layout, order and names of origin do not count.
    """
    whole = (folder / _WHOLE_TOKENIZER).is_file()
    names = (*_SETTINGS, *((_WHOLE_TOKENIZER,) if whole else _VOCABULARIES))
    return {name: _hash(folder / name) for name in sorted(names) if (folder / name).is_file()}


def _hash(path: Path) -> str:
    if path.name not in _SETTINGS:
        return hash_file(path)
    content = path.read_bytes()
    try:
        values = json.loads(content, object_hook=_without_idle)
    except (ValueError, RecursionError):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _without_idle(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in _IDLE}


def changed_settings(now: Mapping[str, str], recorded: Any) -> list[str]:
    """Return the names of files that are not as recorded; none where nothing was recorded.

    Args:
        now: What `hash_settings` says.
        recorded: What it said, from a file that may hold anything.
    """
    if not isinstance(recorded, Mapping) or not recorded:
        return []
    return sorted(
        name for name in {*now, *map(str, recorded)} if now.get(name) != recorded.get(name)
    )


def write_manifest(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> None:
    """List the files of a model's folder with size and sha256 in its MANIFEST.json.

    Folders in it are left out: a copy on the hub may lack them.

    Args:
        folder: The model.
        known: sha256 of files that need not be read for it, by name.
    """
    files = {
        path.name: {
            "sha256": known.get(path.name) or hash_file(path),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    document = {"made_by": f"{_MAKER} {version(_MAKER)}", "files": files, "complete": True}
    (folder / MANIFEST).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def check_manifest(folder: Path, *, key: str, known: Mapping[str, str]) -> Iterator[Problem]:
    """Yield a problem for what differs from the folder's MANIFEST.json, if it has one of ours.

    Args:
        folder: The model.
        key: Configuration key that named it.
        known: sha256 of files that are not read again, by name.
    """
    try:
        document = json.loads((folder / MANIFEST).read_bytes())
        if not str(document["made_by"]).startswith(_MAKER):
            return
        differing = list(_differing(folder, document["files"], known))
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError):
        differing = [f"{MANIFEST} cannot be read"]
    except (KeyError, TypeError, AttributeError):
        # Whatever it lists, it is not of lora-cli.
        return
    if differing:
        yield Problem(
            id="model.changed",
            message=f"`{key}` must name a model as it was written, but {', '.join(differing)}.",
            key=key,
            where=str(folder),
            fix=f"copy or merge it again; if you changed it yourself, delete its {MANIFEST}",
        )


def _differing(folder: Path, files: Mapping[str, Any], known: Mapping[str, str]) -> Iterator[str]:
    for name, entry in files.items():
        path = folder / Path(name).name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != entry["bytes"]:
            yield f"{name} has another size"
        elif (known.get(path.name) or hash_file(path)) != entry["sha256"]:
            yield f"{name} does not match its sha256"
