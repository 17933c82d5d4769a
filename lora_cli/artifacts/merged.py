"""The merged model as an ordinary Hugging Face folder."""

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_cli.errors import Problem, UserError


def save_merged(
    model: Any, tokenizer: Any, folder: Path, *, check: Callable[[Path], None] = lambda _: None
) -> int:
    """Write model and tokenizer with `save_pretrained`, as a whole, and return the bytes written.

    Args:
        model: A transformers model without adapter layers.
        tokenizer: Saved beside it.
        folder: Folder to make or replace; `check_output` has said that this is allowed.
        check: Called with what was written before it is put in place; raises to refuse it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = folder.parent / f".tmp-{folder.name}-{uuid.uuid4().hex[:8]}"
    try:
        # The trained head is float32; on a base of lower precision it is rounded here, once.
        weights = {
            name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in model.state_dict().items()
        }
        model.save_pretrained(staged, state_dict=weights)
        tokenizer.save_pretrained(staged)
        _follow_umask(staged)
        check(staged)
        shutil.rmtree(folder, ignore_errors=True)
        staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return folder_bytes(folder)


def check_output(path: Path, *, key: str, overwrite: bool) -> None:
    """Refuse to write over something, unless `--overwrite` was given and it is safe to replace.

    Raises:
        UserError: If `path` exists and the flag is missing, or if it is a folder that is neither
            a model nor an adapter, which is never deleted.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    fix = "--overwrite replaces it, or choose another place"
    if overwrite:
        known = ("config.json", "adapter_config.json")
        if path.is_file() or any((path / name).is_file() for name in known):
            return
        fix = "choose another place: this folder is not a model, so it is not deleted"
    raise UserError(
        Problem(
            id="output.exists",
            message=f"`{key}` must be a place where nothing is yet, but {path} exists.",
            key=key,
            fix=fix,
        )
    )


def folder_bytes(path: Path) -> int:
    """Return the size of a file, or of all files below a folder, in bytes."""
    if path.is_file():
        return path.stat().st_size
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())


def _follow_umask(folder: Path) -> None:
    """Give files the mode that the umask asks for: safetensors makes them unreadable to others."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
