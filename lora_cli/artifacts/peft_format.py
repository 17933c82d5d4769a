"""Read and write LoRA adapters in the file format of PEFT.

A folder holds `adapter_config.json` and `adapter_model.safetensors`; no pickle is ever opened.
PEFT's names appear in the modules `lora_cli.artifacts.peft_...` only.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

from lora_cli.artifacts.peft_config import CONFIG_FILE, read_config
from lora_cli.artifacts.peft_methods import (
    default_config,
    method_fields,
    peft_type,
    read_settings,
)
from lora_cli.artifacts.peft_ranks import narrow, widen
from lora_cli.artifacts.peft_tensors import (
    PREFIX,
    TOKENS,
    WEIGHTS_FILE,
    adapted_names,
    from_peft_name,
    from_peft_value,
    place_tensors,
    read_tensors,
    to_peft_name,
    to_peft_value,
)
from lora_cli.artifacts.peft_values import TASK_HEADS
from lora_cli.errors import UserError
from lora_cli.lora.patterns import is_inside, matches
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.vera import SHARED_NAME

_REPEATED = (".modules_to_save.bias", ".original_module.bias")


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftAdapter:
    """An adapter as the files hold it.

    Attributes:
        settings: Variant, ranks, strengths and dropout.
        targets: Paths of the adapted layers, or last parts of paths, as read; to be selected with
            `lora_cli.lora.targets.match_targets`. What is written follows from `state`.
        exclude: Paths or last parts of layers that `targets` does not mean, as read.
        layers: Indices of the blocks that `targets` means, as read; None for all.
        layers_pattern: Names of the lists that hold these blocks; empty for any.
        target_parameters: Fused weights of experts: last parts of their names, as read; to be
            selected with `lora_cli.lora.experts.match_parameters`. Their last two parts at least
            when written.
        tokens: Numbers of the tokens whose rows are trained, by path of the embedding.
        saved_modules: Exact paths of the modules that were trained whole.
        task_type: PEFT's name for the kind of task, or None.
        base_name: Hub id or path of the base model.
        revision: Revision of the base model on the hub.
        model_class: Full name of the model's class, such as
            "transformers.models.vit.modeling_vit.ViTModel"; PEFT's automatic loading needs it
            where there is no task type. Not read back.
        fan_in_fan_out: Whether the layers are Conv1D of transformers. Not read back.
        state: Tensors by the names of `lora_cli.lora.state.adapter_state`.
    """

    settings: LoraSettings
    targets: tuple[str, ...] | Literal["all-linear"]
    saved_modules: tuple[str, ...]
    task_type: str | None
    base_name: str | None
    revision: str | None
    state: Mapping[str, torch.Tensor] = field(repr=False)
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)
    model_class: str | None = None
    fan_in_fan_out: bool = False


def peft_files(adapter: PeftAdapter, *, module_names: Iterable[str] = ()) -> dict[str, bytes]:
    """Return the two files of an adapter by name.

    Args:
        adapter: What to write.
        module_names: Paths of all modules of the base model. With them, targets are shortened to
            last parts where these select the same layers; without, full paths are written.
    """
    config, settings = default_config(peft_type(adapter.settings)), adapter.settings
    names = tuple(module_names)
    task_type = _safe_task_type(adapter, names)
    adapted = sorted(adapted_names(adapter.state))
    config |= method_fields(settings, _sized(adapted, adapter.target_parameters)) | {
        "base_model_name_or_path": adapter.base_name,
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "modules_to_save": sorted(adapter.saved_modules) or None,
        "revision": adapter.revision,
        "target_modules": _short_targets(adapted, adapter, names),
        "task_type": task_type,
    }
    state = adapter.state
    if settings.variant == "adalora":
        state, config["rank_pattern"] = narrow(state)
    if adapter.target_parameters:
        config["target_parameters"] = sorted(adapter.target_parameters)
    if adapter.tokens:
        config["trainable_token_indices"] = {n: list(ids) for n, ids in adapter.tokens.items()}
    if task_type is None and adapter.model_class is not None:
        library, _, name = adapter.model_class.rpartition(".")
        config["auto_mapping"] = {"base_model_class": name, "parent_library": library}
    tensors = {
        to_peft_name(name): to_peft_value(name, tensor) for name, tensor in sorted(state.items())
    }
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    return {
        WEIGHTS_FILE: safetensors.torch.save(tensors, {"format": "pt"}),
        CONFIG_FILE: f"{text}\n".encode(),
    }


def load_peft(folder: Path) -> PeftAdapter:
    """Read an adapter that we or PEFT wrote; strict about everything in both files.

    Raises:
        UserError: If a file is missing, unreadable, damaged or a pickle; the config has unknown
            keys, wrong values or features that are not supported; or a tensor has no place. Every
            problem of a file is listed.
    """
    config = read_config(folder / CONFIG_FILE)
    settings = read_settings(config)
    tensors = {
        name: tensor
        for name, tensor in read_tensors(folder).items()
        # With bias "all", PEFT writes the bias of a saved module three times.
        if settings.bias != "all" or not name.endswith(_REPEATED)
    }
    saved, problems = place_tensors(tensors, config, settings, where=str(folder / WEIGHTS_FILE))
    if problems:
        raise UserError(problems)
    state = {
        from_peft_name(name): from_peft_value(name, tensor) for name, tensor in tensors.items()
    }
    if settings.variant == "adalora":
        state = widen(state, config["rank_pattern"])
    targets: Literal["all-linear"] | list[str] | None = config["target_modules"]
    layers, pattern = config["layers_to_transform"], config["layers_pattern"]
    return PeftAdapter(
        settings=_with_sizes(settings, state),
        targets=targets if isinstance(targets, str) else tuple(targets or ()),
        exclude=tuple(config["exclude_modules"] or ()),
        layers=None if layers is None else tuple(layers if isinstance(layers, list) else [layers]),
        layers_pattern=(pattern,) if isinstance(pattern, str) else tuple(pattern or ()),
        target_parameters=tuple(config["target_parameters"] or ()),
        tokens=_tokens(config, tensors),
        saved_modules=saved,
        task_type=config["task_type"],
        base_name=config["base_model_name_or_path"],
        revision=config["revision"],
        state=state,
    )


def _with_sizes(settings: LoraSettings, state: Mapping[str, torch.Tensor]) -> LoraSettings:
    """VeRA's factors may be larger than the adapted layers need: PEFT counts heads as well."""
    if settings.variant != "vera":
        return settings
    columns, rows = state[f"{SHARED_NAME}.A"].shape[1], state[f"{SHARED_NAME}.B"].shape[0]
    return replace(settings, projection_sizes=(columns, rows))


def _tokens(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, tuple[int, ...]]:
    """Return the trained tokens by path of the embedding; a bare list belongs to the only one."""
    tokens = config["trainable_token_indices"]
    if not isinstance(tokens, list):
        return {name: tuple(ids) for name, ids in (tokens or {}).items()}
    found = [name for name in tensors if name.endswith(f".{TOKENS}")]
    return {name.removeprefix(PREFIX).removesuffix(f".{TOKENS}"): tuple(tokens) for name in found}


def _safe_task_type(adapter: PeftAdapter, module_names: Sequence[str]) -> str | None:
    """Drop a task type for which PEFT would look for a head that is not in the file."""
    heads = TASK_HEADS.get(adapter.task_type or "", ())
    if not heads:
        return adapter.task_type
    if module_names:
        wanted = [name for name in module_names if name.endswith(heads)]
        saved = adapter.saved_modules
        complete = all(is_inside(name, saved) for name in wanted)
    else:
        complete = any(name.endswith(heads) for name in adapter.saved_modules)
    return adapter.task_type if complete else None


def _sized(adapted: Iterable[str], fused: Sequence[str]) -> list[str]:
    """Return what has a rank of its own: layers, and instead of experts each of their weights."""
    names = []
    for name in adapted:
        inside = [pattern.rpartition(".") for pattern in fused]
        weights = [f"{name}.{last}" for module, _, last in inside if matches(module, name)]
        names += weights or [name]
    return names


def _short_targets(
    adapted: Sequence[str], adapter: PeftAdapter, module_names: Sequence[str]
) -> list[str]:
    # Experts have no module of their own: PEFT finds them by `target_parameters`.
    exact = {name for name in adapted if _sized([name], adapter.target_parameters) == [name]}
    short = {name.rpartition(".")[2] for name in exact}
    selected = {
        name
        for name in module_names
        if name.rpartition(".")[2] in short and not is_inside(name, adapter.saved_modules)
    }
    return sorted(short if selected == exact else exact)
