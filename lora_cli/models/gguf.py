"""A base model in one GGUF file, the format of llama.cpp. Does not import torch.

transformers turns the blocks of such a file into plain weights, and reads configuration and
tokenizer from it as well.
"""

from importlib.util import find_spec
from pathlib import Path

from lora_cli import packages
from lora_cli.errors import Problem, UserError

_MAGIC = b"GGUF"


def is_gguf(path: str) -> bool:
    """Whether a model source is the name of a GGUF file, unless a folder is called so."""
    return path.lower().endswith(".gguf") and not Path(path).expanduser().is_dir()


def find_gguf(path: str, *, key: str) -> Path:
    """Return the file that a model source names, without reading more than its first bytes.

    Args:
        path: Local file, or pkg://package/file.
        key: Configuration key that holds it.

    Raises:
        UserError: If there is no such file, it is of another format, or the package that reads it
            is not installed.
    """
    if path.startswith(packages.PREFIX):
        file = packages.resolve_package_path(path, key=key)
    else:
        file = Path(path).expanduser()
    try:
        with file.open("rb") as stream:
            found = None if stream.read(len(_MAGIC)) == _MAGIC else "is of another format"
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
    if found is not None:
        raise UserError(
            Problem(
                id="model.bad-gguf",
                message=f'`{key}` must name a GGUF file, but "{path}" {found}.',
                key=key,
                fix=f"{key}=FILE.gguf, or {key}=DIR for a folder with config.json",
            )
        )
    if find_spec("gguf") is None:
        raise UserError(
            Problem(
                id="model.missing-extra",
                message=f"`{key}` must name a folder where the package gguf is not installed, but "
                f'is "{path}".',
                key=key,
                fix='pip install "lora-cli[gguf]"',
            )
        )
    return file
