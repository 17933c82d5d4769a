"""A model without its numbers: names and shapes from config.json, in a moment."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from lora_cli.config.sections import ModelConfig
from lora_cli.errors import Problem, UserError
from lora_cli.models.base import (
    LAYER_OR_EMBEDDING,
    LOAD_ERRORS,
    load_config,
    loading_problem,
    silence,
)
from lora_cli.models.folders import KEY, check_configs
from lora_cli.models.gguf import find_gguf, is_gguf
from lora_cli.models.heads import head_names
from lora_cli.models.sources import ModelSource, find_folder, from_hub
from lora_cli.models.weights import weight_files


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model on the meta device.

    Attributes:
        model: The model, with the head where its architecture has such a head.
        new_keys: Names of parameters that the weights do not provide, as loading would report
            them.
        has_head: Whether the architecture has a head of the kind that was asked for.
        knows_weights: Whether `new_keys` was read from the weights' list of names; otherwise all
            outside of the body is taken to be new.
    """

    model: Any
    new_keys: tuple[str, ...]
    has_head: bool
    knows_weights: bool


def resolve_config(
    path: str, *, revision: str | None = None, is_offline: bool = False
) -> ModelSource:
    """Find the config.json of a model and check it; weights need not be there.

    Args:
        path: Local folder, pkg://package/folder, or hub id, of which config.json alone is fetched.
        revision: Branch, tag or commit on the hub.
        is_offline: Whether to look for a model of the hub in its cache alone.

    Returns:
        The folder; `sha256` is empty, since no weights are read.

    Raises:
        UserError: If there is no such model, the hub cannot be reached, or the folder asks for
            more than data.
    """
    if is_gguf(path):
        file = find_gguf(path, key=KEY)
        return ModelSource(file.parent, path, None, "", gguf=file.name)
    folder = find_folder(path)
    if folder is None:
        from huggingface_hub import hf_hub_download

        def fetch() -> str:
            return hf_hub_download(
                path, "config.json", revision=revision, local_files_only=is_offline
            )

        folder = from_hub(fetch, path=path, revision=revision).parent
    problems = list(check_configs(folder))
    if problems:
        raise UserError(problems)
    return ModelSource(folder, path, revision, "")


def check_architecture(config: Any, expected: ModelConfig) -> None:
    """Compare a loaded model with what the settings expect of it.

    Raises:
        UserError: If it is another.
    """
    found = {
        "architecture": (expected.architecture, config.model_type),
        "num_layers": (
            expected.num_layers,
            getattr(config.get_text_config(), "num_hidden_layers", None),
        ),
    }
    problems = [
        Problem(
            id="model.other-architecture",
            message=f"`model.{name}` must be that of the model, {actual}, but is {wanted}.",
            key=f"model.{name}",
            fix=f"leave model.{name} out, or name another model",
        )
        for name, (wanted, actual) in found.items()
        if wanted is not None and wanted != actual
    ]
    if problems:
        raise UserError(problems)


def token_positions(config: Any) -> int | None:
    """Return how many tokens a model can look at, of Whisper its decoder; None where any number.

    Args:
        config: Of the model, or of its part that reads the tokens.
    """
    own = getattr(config, "max_target_positions", None)
    positions = getattr(config, "max_position_embeddings", own)
    return positions if isinstance(positions, int) and positions > 0 else None


def load_architecture(
    source: ModelSource, *, auto_class: str, options: Mapping[str, Any]
) -> Architecture:
    """Build a model without numbers.

    Args:
        source: What `resolve_config` returned.
        auto_class: Name of a transformers Auto class; where the architecture has no such head,
            the body alone is built.
        options: Settings of the configuration, such as num_labels.

    Raises:
        UserError: If transformers cannot build it.
    """
    has_head = True
    try:
        model = _build(source, auto_class, options)
    except LOAD_ERRORS as error:
        if "Unrecognized configuration class" not in str(error):
            raise UserError(loading_problem(error, source, auto_class)) from error
        has_head = False
        try:
            model = _build(source, "AutoModel", {})
        except LOAD_ERRORS as second:
            raise UserError(loading_problem(second, source, "AutoModel")) from second
    shapes = None if source.gguf is not None else _stored_shapes(source.folder)
    return Architecture(
        model=model.eval(),
        new_keys=_new_keys(model, shapes),
        has_head=has_head,
        knows_weights=shapes is not None,
    )


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]] | None:
    """Return names and shapes of the stored tensors, or None where no weights can be read."""
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for name in weight_files(folder):
            with safe_open(folder / name, framework="np") as stored:
                shapes |= {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, ValueError, RecursionError, OSError):
        return None
    return shapes


def _build(source: ModelSource, auto_class: str, options: Mapping[str, Any]) -> Any:
    config = load_config(source)
    for name, value in options.items():
        setattr(config, name, value)
    with silence(), torch.device("meta"):
        return getattr(transformers, auto_class).from_config(config, trust_remote_code=False)


def _new_keys(model: Any, shapes: Mapping[str, tuple[int, ...]] | None) -> tuple[str, ...]:
    """The parameters that the weights lack, or have in another shape.

    Within the body, layers and embeddings are taken to be there: loading refuses weights without
    them.
    """
    prefix = f"{model.base_model_prefix}."
    heads = tuple(f"{head}." for head in head_names(model))
    own = {name: tuple(value.shape) for name, value in model.named_parameters()}
    outside = {name for name in own if name.startswith(heads)}
    if shapes is None:
        return tuple(sorted(outside))
    moved = _moved(model, shapes)
    return tuple(
        sorted(
            name
            for name, shape in own.items()
            if (name in outside or not LAYER_OR_EMBEDDING.search(name.lower()))
            and shape not in (shapes.get(other) for other in _spellings(name, prefix))
            and (_tail(name), shape) not in moved
        )
    )


def _moved(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> set[tuple[str, tuple[int, ...]]]:
    """Return ends of names, with shapes, of weights that may have other names in the model.

    Weights of models that look at images are stored under the names that their parts once had,
    such as ``language_model.lm_head.weight`` of LLaVA.
    """
    if model.config.get_text_config() is model.config:
        return set()
    return {(_tail(name), shape) for name, shape in shapes.items()}


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _spellings(name: str, prefix: str) -> tuple[str, ...]:
    """How a parameter may be called in weights that were saved with or without another head."""
    return name, name.removeprefix(prefix), prefix + name
