"""Read and write LoRA adapters in the file format of PEFT.

A folder holds `adapter_config.json` and `adapter_model.safetensors`; no pickle is ever opened.
PEFT's names appear here and in `lora_cli.artifacts.peft_config` only.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError

from lora_cli.artifacts.peft_config import CONFIG_FILE, TASK_HEADS, default_config, read_config
from lora_cli.errors import Problem, UserError

WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_LORA_LEAVES = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftAdapter:
    """An adapter as the files hold it.

    Attributes:
        r: Rank of every update.
        alpha: Strength of the update before division by `r`.
        dropout: Chance of zeroing an input element, when training goes on.
        targets: Paths of the adapted layers, or last parts of paths, as read; to be selected with
            `lora_cli.lora.targets.match_targets`. What is written follows from `state`.
        exclude: Paths or last parts of layers that `targets` does not mean, as read.
        saved_modules: Exact paths of the modules that were trained whole.
        task_type: PEFT's name for the kind of task, or None.
        base_name: Hub id or path of the base model.
        revision: Revision of the base model on the hub.
        model_class: Full name of the model's class, such as
            "transformers.models.vit.modeling_vit.ViTModel"; PEFT's automatic loading needs it
            where there is no task type. Not read back.
        state: Tensors by the names of `lora_cli.lora.state.adapter_state`.
    """

    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...] | Literal["all-linear"]
    saved_modules: tuple[str, ...]
    task_type: str | None
    base_name: str | None
    revision: str | None
    state: Mapping[str, torch.Tensor] = field(repr=False)
    exclude: tuple[str, ...] = ()
    model_class: str | None = None


def peft_files(adapter: PeftAdapter, *, module_names: Iterable[str] = ()) -> dict[str, bytes]:
    """Return the two files of an adapter by name.

    Args:
        adapter: What to write.
        module_names: Paths of all modules of the base model. With them, targets are shortened to
            last parts where these select the same layers; without, full paths are written.
    """
    config = default_config()
    names = tuple(module_names)
    task_type = _safe_task_type(adapter, names)
    config |= {
        "base_model_name_or_path": adapter.base_name,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": sorted(adapter.saved_modules) or None,
        "r": adapter.r,
        "revision": adapter.revision,
        "target_modules": _short_targets(adapter, names),
        "task_type": task_type,
    }
    if task_type is None and adapter.model_class is not None:
        library, _, name = adapter.model_class.rpartition(".")
        config["auto_mapping"] = {"base_model_class": name, "parent_library": library}
    tensors = {_PREFIX + name: tensor for name, tensor in sorted(adapter.state.items())}
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
    tensors = _read_tensors(folder)
    saved, problems = _place_tensors(tensors, config, where=str(folder / WEIGHTS_FILE))
    if problems:
        raise UserError(problems)
    targets: Literal["all-linear"] | list[str] = config["target_modules"]
    return PeftAdapter(
        r=config["r"],
        alpha=float(config["lora_alpha"]),
        dropout=float(config["lora_dropout"]),
        targets=tuple(targets) if isinstance(targets, list) else targets,
        exclude=tuple(config["exclude_modules"] or ()),
        saved_modules=saved,
        task_type=config["task_type"],
        base_name=config["base_model_name_or_path"],
        revision=config["revision"],
        state={name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()},
    )


def _safe_task_type(adapter: PeftAdapter, module_names: Sequence[str]) -> str | None:
    """Drop a task type for which PEFT would look for a head that is not in the file."""
    heads = TASK_HEADS.get(adapter.task_type or "", ())
    if not heads:
        return adapter.task_type
    if module_names:
        wanted = [name for name in module_names if name.endswith(heads)]
        saved = adapter.saved_modules
        complete = all(any(_is_inside(name, module) for module in saved) for name in wanted)
    else:
        complete = any(name.endswith(heads) for name in adapter.saved_modules)
    return adapter.task_type if complete else None


def _short_targets(adapter: PeftAdapter, module_names: Sequence[str]) -> list[str]:
    exact = {
        name.removesuffix(leaf)
        for name in adapter.state
        for leaf in _LORA_LEAVES
        if name.endswith(leaf)
    }
    short = {name.rpartition(".")[2] for name in exact}
    selected = {
        name
        for name in module_names
        if name.rpartition(".")[2] in short
        and not any(_is_inside(name, module) for module in adapter.saved_modules)
    }
    return sorted(short if selected == exact else exact)


def _is_inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    try:
        # Bytes, not a memory map: the same file may be written again while the tensors live.
        return safetensors.torch.load(path.read_bytes())
    except FileNotFoundError:
        pickled = sorted(p.name for p in folder.glob("adapter_model.*") if p.suffix != path.suffix)
        found = f", but there is only {pickled[0]}" if pickled else ", but does not"
        raise UserError(
            Problem(
                id="adapter.missing-file",
                message=f"The adapter folder must hold {WEIGHTS_FILE}{found}.",
                where=str(folder),
                fix="load the adapter with PEFT where you trust it and save it again: "
                "save_pretrained writes safetensors."
                if pickled
                else "copy the whole folder again.",
            )
        ) from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            Problem(
                id="adapter.damaged",
                message=f"{WEIGHTS_FILE} must be a whole safetensors file, but reading it gave: "
                f"{error}.",
                where=str(path),
                fix="copy the file again.",
            )
        ) from None


def _place_tensors(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], *, where: str
) -> tuple[tuple[str, ...], list[Problem]]:
    """Tell adapters from saved modules, and report tensors that are neither or of another rank.

    Returns:
        Exact paths of the saved modules, sorted, and the problems.
    """
    listed: list[str] = config["modules_to_save"] or []
    heads = TASK_HEADS.get(config["task_type"] or "", ())
    endings = tuple(dict.fromkeys((*listed, *heads)))
    saved: set[str] = set()
    stray, misfits = [], []
    for key, tensor in sorted(tensors.items()):
        name = key.removeprefix(_PREFIX)
        if name == key:
            stray.append(key)
        elif name.endswith(_LORA_LEAVES):
            rank_axis = 0 if name.endswith(_LORA_LEAVES[0]) else 1
            if tensor.ndim != 2 or tensor.shape[rank_axis] != config["r"]:
                misfits.append(f"{key} {tuple(tensor.shape)}")
        elif (module := _saved_module(name, endings)) is not None:
            saved.add(module)
        else:
            stray.append(key)
    # PEFT lists the usual heads together, whichever of them the model has.
    optional = heads if set(heads) <= set(listed) else ()
    absent = [
        name
        for name in dict.fromkeys(listed)
        if name not in optional and not any(module.endswith(name) for module in saved)
    ]
    faults = {
        "must hold adapters and listed modules only, but also holds": stray,
        f"must hold adapters of rank {config['r']}, but holds": misfits,
        "must hold every module of modules_to_save, but lacks": absent,
    }
    problems = [
        Problem(
            id="adapter.tensors",
            message=f"{WEIGHTS_FILE} {rule} {', '.join(names)}.",
            where=where,
        )
        for rule, names in faults.items()
        if names
    ]
    return tuple(sorted(saved)), problems


def _saved_module(name: str, endings: tuple[str, ...]) -> str | None:
    """The outermost module on the path of a tensor whose path ends as PEFT's matching asks."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        module = ".".join(parts[:end])
        if endings and module.endswith(endings):
            return module
    return None
