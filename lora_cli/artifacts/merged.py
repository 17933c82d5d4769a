"""The merged model as an ordinary Hugging Face folder."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError

from lora_cli.artifacts.commit import put_in_place, staged_beside
from lora_cli.artifacts.room import find_obstacle
from lora_cli.artifacts.tuned import TUNED_FILE
from lora_cli.errors import Problem, UserError
from lora_cli.models.integrity import write_manifest

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def save_merged(
    model: Any,
    processor: Any,
    folder: Path,
    *,
    check: Callable[[Path], None] = lambda _: None,
    max_bytes: int | None = None,
    sync: bool = True,
) -> int:
    """Write model and processor as a whole, and return the bytes written.

    Args:
        model: A transformers model without adapter layers.
        processor: Tokenizer or processor of media, saved beside it.
        folder: Folder to make or replace; `check_output` has said that this is allowed.
        check: Called with what was written before it is put in place; raises to refuse it.
        max_bytes: The largest size of a file of weights; None leaves that to transformers.
        sync: Whether to wait until the disk holds it.
    """
    with staged_beside(folder) as staged:
        write_merged(model, processor, staged, max_bytes=max_bytes)
        check(staged)
        put_in_place(staged, folder, sync=sync)
    return folder_bytes(folder)


def write_merged(
    model: Any,
    processor: Any,
    folder: Path,
    *,
    more: Mapping[str, torch.Tensor] = MappingProxyType({}),
    max_bytes: int | None = None,
) -> None:
    """Write model and processor into a folder with `save_pretrained`, and a list of the files last.

    Args:
        model: A transformers model without adapter layers.
        processor: Tokenizer or processor of media, saved beside it.
        folder: Where to.
        more: Tensors that this model has no place for, and others on the same body have, by the
            names that they have in the file.
        max_bytes: The largest size of a file of weights; None leaves that to transformers.

    Raises:
        OSError: If writing failed.
    """
    # Merging tensor by tensor does without transformers, whose import takes its time.
    from lora_cli.models.base import silence

    # The trained head is float32; on a base of lower precision it is rounded here, once.
    weights = {
        name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in {**model.state_dict(), **more}.items()
    }
    sizes = {} if max_bytes is None else {"max_shard_size": max_bytes}
    with silence(), _os_errors(folder):
        model.save_pretrained(folder, state_dict=weights, **sizes)
        processor.save_pretrained(folder)
    write_manifest(folder)
    follow_umask(folder)


@contextmanager
def _os_errors(folder: Path) -> Iterator[None]:
    """Turn what safetensors makes of an error of the file system back into one."""
    try:
        yield
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(folder)) from error


def check_output(
    path: Path,
    *,
    key: str,
    overwrite: bool,
    is_file: bool = False,
    inputs: Iterable[Path] = (),
) -> None:
    """Refuse to write over something, unless `--overwrite` was given and it is safe to replace.

    Args:
        path: What is about to be written.
        key: Configuration key that named it.
        overwrite: Whether something that exists may be replaced.
        is_file: Whether a file is to be written, which never replaces a folder.
        inputs: What the command reads, and which is never replaced.

    Raises:
        UserError: If `path` exists and the flag is missing, if it is or holds an input, if it is
            a folder that is neither a model nor an adapter, or if nothing can be made there.
    """
    found, fix = None, "choose another place"
    whole, obstacle = path.resolve(), find_obstacle(path)
    if any(whole == kept or whole in kept.parents for kept in (p.resolve() for p in inputs)):
        found = f"{path} is what the command reads"
    elif obstacle is not None:
        found = f"{path} cannot be made: {obstacle}"
    elif path.is_dir() and (is_file or (any(path.iterdir()) and not _is_model(path))):
        found = f"{path} is a folder" + ("" if is_file else " that is not a model")
    elif not overwrite and path.exists() and (path.is_file() or any(path.iterdir())):
        found, fix = f"{path} exists", "--overwrite replaces it, or choose another place"
    if found is not None:
        raise UserError(
            Problem(
                id="output.exists" if obstacle is None else "output.unusable",
                message=f"`{key}` must be a place where nothing is yet, but {found}.",
                key=key,
                fix=fix,
            )
        )


def _is_model(folder: Path) -> bool:
    marks = ("config.json", "adapter_config.json", TUNED_FILE, "Modelfile")
    return any((folder / name).is_file() for name in marks)


def folder_bytes(path: Path) -> int:
    """Return the size of a file, or of all files below a folder, in bytes."""
    if path.is_file():
        return path.stat().st_size
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())


def follow_umask(folder: Path) -> None:
    """Give files the mode that the umask asks for: safetensors makes them unreadable to others."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
