"""A prefix in PEFT's files: its config PREFIX_TUNING, and its tensor ``prompt_embeddings``.

As in `lora_cli.artifacts.peft_config`, a file from elsewhere is untrusted: keys are a closed set.
Beside the prefix there are modules trained whole, such as the head, after ``base_model.``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lora_cli.artifacts.tuned import Tuned, read_safetensors
from lora_cli.errors import Problem, UserError
from lora_cli.lora.prefix import STATE, PrefixSize

PREFIX_TUNING = "PREFIX_TUNING"
_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_SIZE = 1 << 20
_TENSOR, _MODULES = "prompt_embeddings", "base_model."

_SIZES = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
# Every field that PEFT 0.21 writes. The network that may have made the embeddings is not in the
# file, and its width has no meaning after training.
_FIELDS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "encoder_hidden_size": None,
    "inference_mode": True,
    "init_weights": None,
    "modules_to_save": None,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": None,
    "peft_type": PREFIX_TUNING,
    "peft_version": "0.21.0",
    "prefix_projection": False,
    "revision": None,
    "task_type": None,
    "token_dim": None,
}


def is_prefix(folder: Path) -> bool:
    """Whether an adapter folder says that it holds a prefix."""
    path = folder / _CONFIG_FILE
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            return False
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == PREFIX_TUNING


def prefix_files(tuned: Tuned, size: PrefixSize) -> dict[str, bytes]:
    """Return the two files of a prefix by name."""
    config = _FIELDS | {
        "base_model_name_or_path": tuned.base_name,
        "encoder_hidden_size": size.token_size,
        "modules_to_save": sorted(tuned.saved_modules) or None,
        "num_attention_heads": size.num_heads,
        "num_layers": size.num_layers,
        "num_virtual_tokens": size.num_tokens,
        "revision": tuned.revision,
        "task_type": tuned.task_type,
        "token_dim": size.token_size,
    }
    tensors = {
        _TENSOR if name == STATE else _MODULES + name: tensor
        for name, tensor in sorted(tuned.state.items())
    }
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    return {
        _WEIGHTS_FILE: safetensors.torch.save(tensors, {"format": "pt"}),
        _CONFIG_FILE: f"{text}\n".encode(),
    }


def load_prefix(folder: Path) -> Tuned:
    """Read a prefix that we or PEFT wrote, of which `is_prefix` is true.

    Raises:
        UserError: If a file is missing or damaged, the config has unknown keys or wrong values, or
            a tensor has no place or is of another shape than the config says.
    """
    path = folder / _CONFIG_FILE
    config: dict[str, Any] = json.loads(path.read_bytes())
    problems = _check_config(config, where=str(path))
    if problems:
        raise UserError(problems)
    config = _FIELDS | config
    heads, width = config["num_attention_heads"], config["token_dim"]
    size = PrefixSize(
        num_tokens=config["num_virtual_tokens"],
        num_layers=config["num_layers"],
        num_heads=heads,
        head_size=width // heads,
    )
    tensors = read_safetensors(folder / _WEIGHTS_FILE)
    _check_tensors(tensors, size, where=str(folder / _WEIGHTS_FILE))
    state = {
        STATE if name == _TENSOR else name.removeprefix(_MODULES): tensor
        for name, tensor in tensors.items()
    }
    return Tuned(
        state=state,
        saved_modules=tuple(sorted(set(config["modules_to_save"] or ()))),
        task_type=config["task_type"],
        base_name=config["base_model_name_or_path"],
        revision=config["revision"],
        prefix=size,
    )


def _check_config(config: Mapping[str, Any], *, where: str) -> list[Problem]:
    rules = [f"known keys only, but has {key!r:.80}" for key in sorted(set(config) - set(_FIELDS))]
    full = _FIELDS | dict(config)
    for key in _SIZES:
        value = full[key]
        fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_SIZE
        if not fits:
            rules.append(f'a size as "{key}", but has {value!r:.80}')
    if not rules and full["token_dim"] % full["num_attention_heads"]:
        rules.append(
            f'a multiple of "num_attention_heads" as "token_dim", but has {full["token_dim"]}'
        )
    if full["num_transformer_submodules"] != 1:
        found = f"{full['num_transformer_submodules']!r:.80}"
        rules.append(f'1 as "num_transformer_submodules", but has {found}')
    for key in ("base_model_name_or_path", "revision", "task_type"):
        if full[key] is not None and not isinstance(full[key], str):
            rules.append(f'text or null as "{key}", but has {full[key]!r:.80}')
    modules = full["modules_to_save"]
    if modules is not None and not (
        isinstance(modules, list) and all(isinstance(name, str) for name in modules)
    ):
        rules.append(f'names or null as "modules_to_save", but has {modules!r:.80}')
    return [
        Problem(
            id="adapter.bad-value",
            message=f"{_CONFIG_FILE} of a prefix must hold {rule}.",
            where=where,
        )
        for rule in rules
    ]


def _check_tensors(tensors: Mapping[str, torch.Tensor], size: PrefixSize, *, where: str) -> None:
    stray = [name for name in tensors if name != _TENSOR and not name.startswith(_MODULES)]
    rules = []
    if _TENSOR not in tensors:
        rules.append(f"hold {_TENSOR}, but does not")
    elif tuple(tensors[_TENSOR].shape) != size.shape:
        found = tuple(tensors[_TENSOR].shape)
        rules.append(f"hold {_TENSOR} of shape {size.shape}, but that is {found}")
    if stray:
        rules.append(f"hold the prefix and listed modules only, but also holds {', '.join(stray)}")
    if rules:
        raise UserError(
            [
                Problem(id="adapter.tensors", message=f"{_WEIGHTS_FILE} must {rule}.", where=where)
                for rule in rules
            ]
        )
