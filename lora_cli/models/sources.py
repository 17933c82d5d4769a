"""Where a base model is, and whether its folder can be trusted as data. Does not import torch."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_cli import packages
from lora_cli.errors import Problem, UserError
from lora_cli.models.folders import KEY, check_folder
from lora_cli.models.gguf import find_gguf, is_gguf
from lora_cli.models.integrity import check_manifest, hash_settings
from lora_cli.models.weights import combine_hashes, hash_file, hash_weight_files

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.spm", "*.jinja"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checked folder with a base model.

    Attributes:
        folder: Where the files are.
        name: The source as the user wrote it.
        revision: Commit of a model from the hub, else None.
        sha256: Hash of the weights: of the file, or, where they are in several, of the lines
            "name sha256" of all of them in order of name.
        gguf: Name of the GGUF file in the folder that is the whole model, else None.
        settings: sha256 of each file of settings and tokenizer; see `hash_settings`.
    """

    folder: Path
    name: str
    revision: str | None
    sha256: str
    gguf: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def place(self) -> Path:
        """What `resolve_model` finds it by on this machine: the folder, or the GGUF file."""
        return self.folder if self.gguf is None else self.folder / self.gguf

    @property
    def hashes(self) -> dict[str, Any]:
        """What a record says of it, so that another one is told from it."""
        return {"sha256": self.sha256, "settings": dict(self.settings)}

    @property
    def weights_bytes(self) -> int:
        """Size of the weights on disk."""
        files = self.folder.glob("*.safetensors") if self.gguf is None else [self.place]
        return sum(file.stat().st_size for file in files)


def resolve_model(
    path: str, *, revision: str | None = None, processor: str | None = "tokenizer"
) -> ModelSource:
    """Find a base model and check its folder, without loading it.

    Args:
        path: Local folder, pkg://package/folder, or hub id; an existing folder comes first. A
            GGUF file is a model of its own.
        revision: Branch, tag or commit on the hub.
        processor: What the folder must hold besides the model; None asks for nothing.

    Raises:
        UserError: If there is no such model, the hub cannot be reached, or the folder lacks
            files or asks for more than data.
    """
    source = locate_model(path, revision=revision, processor=processor)
    if source.gguf is not None:
        return replace(source, sha256=hash_file(source.place))
    hashes = hash_weight_files(source.folder)
    check_unchanged(source, hashes)
    return replace(source, sha256=combine_hashes(hashes))


def locate_model(
    path: str, *, revision: str | None = None, processor: str | None = "tokenizer"
) -> ModelSource:
    """Do as `resolve_model` without reading the weights: `sha256` is empty."""
    if is_gguf(path):
        file = find_gguf(path, key=KEY)
        return ModelSource(file.parent, path, None, "", gguf=file.name)
    local = find_folder(path)
    if local is None:
        folder = _download(path, revision)
        commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision
    else:
        folder, commit = local, None
    problems = list(check_folder(folder, processor=processor))
    if problems:
        raise UserError(problems)
    return ModelSource(folder, path, commit, "", settings=hash_settings(folder))


def check_unchanged(source: ModelSource, hashes: Mapping[str, str]) -> None:
    """Compare a folder with its MANIFEST.json, if it has one of ours.

    Args:
        source: What `locate_model` found.
        hashes: sha256 of each file of weights.

    Raises:
        UserError: If a file is not as it was written.
    """
    if changed := list(check_manifest(source.folder, key=KEY, known=hashes)):
        raise UserError(changed)


def check_sha256(source: ModelSource, expected: str | None) -> None:
    """Compare the weights with a recorded hash; None accepts any.

    Raises:
        UserError: If they differ.
    """
    if expected is None or expected.lower() == source.sha256:
        return
    raise UserError(
        Problem(
            id="model.other-weights",
            message=(
                f"`{KEY}` must hold the weights with sha256 {expected[:16]}..., but {source.name} "
                f"has {source.sha256[:16]}...."
            ),
            key=KEY,
            where=str(source.folder),
            fix="name the folder with the original weights, or the revision that was used",
        )
    )


def find_folder(path: str) -> Path | None:
    """Return the local folder that a model is in, or None where `path` is a hub id.

    Raises:
        UserError: If it can be neither.
    """
    if path.startswith(packages.PREFIX):
        return packages.resolve_package_path(path, key=KEY)
    folder = Path(path).expanduser()
    if path and folder.is_dir():
        return folder
    if path and folder.exists():
        message = f'`{KEY}` must name a folder, but "{path}" is a file.'
    elif path and path[0] not in "./~\\" and _HUB_ID.fullmatch(path):
        return None
    else:
        message = f'`{KEY}` must name a folder, but there is no such folder: "{path}".'
    raise UserError(
        Problem(
            id="model.no-such-folder",
            message=message,
            key=KEY,
            allowed="a folder, a hub id such as google-bert/bert-base-uncased, pkg://..., or a "
            "GGUF file",
            fix=f"{KEY}=DIR, or model=minilm",
        )
    )


def _download(path: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    return from_hub(
        lambda: snapshot_download(
            path, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]
        ),
        path=path,
        revision=revision,
    )


def from_hub(fetch: Callable[[], str], *, path: str, revision: str | None) -> Path:
    """Return what `fetch` puts into the hub's cache.

    Args:
        fetch: A call of huggingface_hub.
        path: Hub id of the model.
        revision: Branch, tag or commit.

    Raises:
        UserError: If the hub cannot be reached or has no such model for the user.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(fetch())
    except LocalEntryNotFoundError as error:
        raise UserError(_unreachable(path)) from error
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        wanted = f'"{path}"' if revision is None else f'"{path}" at revision {revision}'
        reason = "its licence has not been accepted" if isinstance(error, GatedRepoError) else ""
        raise UserError(
            Problem(
                id="model.not-on-hub",
                message=(
                    f"`{KEY}` must name a model that you may read, but the hub has no {wanted}"
                    f"{' for you: ' + reason if reason else ''}."
                ),
                key=KEY,
                fix="check the name, or log in with `hf auth login` if the model is private",
            )
        ) from error
    # The HTTP library's errors are not OSErrors, and which library it is depends on the version.
    except Exception as error:
        raise UserError(_unreachable(path)) from error


def _unreachable(path: str) -> Problem:
    return Problem(
        id="model.hub-unreachable",
        message=(
            f"`{KEY}` must name a model that can be read, but the hub cannot be reached and "
            f'"{path}" is not in its cache.'
        ),
        key=KEY,
        allowed="a folder, a model in the hub cache (HF_HOME), or pkg://package/folder",
        fix=f"{KEY}=DIR, or, for texts, model=minilm, which needs no hub",
    )
