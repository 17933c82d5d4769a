"""Base models in GGUF files, written into the cache as an ordinary folder, which is read faster."""

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from lora_cli.artifacts.merged import save_merged
from lora_cli.commands.display import Display
from lora_cli.data.cache import cache_folder
from lora_cli.errors import UserError
from lora_cli.models.base import load_base, load_tokenizer
from lora_cli.models.sources import ModelSource, resolve_model


def as_folder(source: ModelSource, display: Display | None = None) -> ModelSource:
    """Return where the model of a GGUF file is loaded from; any other source is returned as it is.

    The folder is made when the file is first used, has its weights in float32, and is made again
    where it is damaged. Everything else of the source stays that of the file. Where the file is no
    whole model, or the cache cannot be written, the file itself is loaded.

    Args:
        source: What `resolve_model` found.
        display: Told that a folder is made.
    """
    if source.gguf is None:
        return source
    folder = cache_folder() / "models" / f"{source.sha256[:32]}-{version('transformers')}"
    if not _is_whole(folder):
        if display is not None:
            display.note(f"model: converting {source.name} once, into {folder}")
        try:
            _convert(source, folder)
        except (UserError, OSError):
            return source
    return replace(source, folder=folder, gguf=None)


def _is_whole(folder: Path) -> bool:
    try:
        resolve_model(str(folder))
    except UserError:
        return False
    return True


def _convert(source: ModelSource, folder: Path) -> None:
    tokenizer = load_tokenizer(source)
    base = load_base(source, auto_class="AutoModelForCausalLM", options={}, dtype="float32", seed=0)
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_merged(base.model, tokenizer, folder)
