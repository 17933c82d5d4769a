"""The tensors of a PEFT file: read without pickle, and each told what it belongs to."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from lora_cli.artifacts.peft_values import TASK_HEADS
from lora_cli.errors import Problem, UserError
from lora_cli.lora.patterns import outermost
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.vera import SHARED_NAME

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
TOKENS = "token_adapter.trainable_tokens_delta"
# For each leaf of an adapted layer the axis that is as long as the rank, of how many axes at
# least; None where none is.
_FACTORS: dict[str, tuple[int, int] | None] = {
    "lora_A.weight": (0, 2),
    "lora_B.weight": (1, 2),
    "lora_B.bias": None,
    "lora_embedding_A": (0, 2),
    "lora_embedding_B": (1, 2),
    "lora_magnitude_vector": None,
}
_ADALORA: dict[str, tuple[int, int] | None] = {
    "lora_A": (0, 2),
    "lora_B": (1, 2),
    "lora_E": (0, 2),
}
_VERA: dict[str, tuple[int, int] | None] = {"vera_lambda_b": None, "vera_lambda_d": (0, 1)}
# VeRA's factors belong to no layer.
_SHARED: dict[str, tuple[int, int] | None] = {
    f"{SHARED_NAME}.A": (0, 2),
    f"{SHARED_NAME}.B": (1, 2),
}
# PEFT adds the update of the output projection of `nn.MultiheadAttention` to its weight twice
# (huggingface/peft#3774), and says nothing else: half of it is what gives the right sum there.
_ADDED_TWICE = ".base_layer.out_proj.lora_B.weight"
_THEIR_NAMES = {
    f"{SHARED_NAME}.A": "base_model.vera_A",
    f"{SHARED_NAME}.B": "base_model.vera_B",
}


def to_peft_name(name: str) -> str:
    """Return what PEFT calls a tensor of adapter state."""
    return _THEIR_NAMES.get(name, PREFIX + name)


def from_peft_name(key: str) -> str:
    """Return the name in adapter state of a tensor of PEFT's; other keys stay as they are."""
    ours = {theirs: name for name, theirs in _THEIR_NAMES.items()}
    name = ours.get(key, key.removeprefix(PREFIX))
    return key if key == PREFIX + name and name in _THEIR_NAMES else name


def to_peft_value(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return what PEFT 0.21 has to read so that its model computes what `tensor` means.

    Args:
        name: In adapter state.
        tensor: Its value.
    """
    return tensor / 2 if name.endswith(_ADDED_TWICE) else tensor


def from_peft_value(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Undo `to_peft_value`, to the last bit."""
    return tensor * 2 if name.endswith(_ADDED_TWICE) else tensor


def adapted_names(state: Iterable[str]) -> set[str]:
    """Return the paths of the adapted layers that tensor names belong to.

    Adapters within one layer, such as those of an attention's output projection and of further
    weights of experts, belong to the outermost.
    """
    leaves = tuple(f".{leaf}" for leaf in {**_FACTORS, **_ADALORA, **_VERA})
    return {
        outermost(name.removesuffix(leaf))
        for name in state
        for leaf in leaves
        if name.endswith(leaf)
    }


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read the weights of an adapter folder.

    Raises:
        UserError: If the file is missing, damaged or a pickle.
    """
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
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            Problem(
                id="adapter.damaged",
                message=f"{WEIGHTS_FILE} must be a whole safetensors file, but reading it gave: "
                f"{error}.",
                where=str(path),
                fix="copy the file again.",
            )
        ) from None


def place_tensors(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    settings: LoraSettings,
    *,
    where: str,
) -> tuple[tuple[str, ...], list[Problem]]:
    """Tell adapters from saved modules, and report tensors that are neither or of another rank.

    Returns:
        Exact paths of the saved modules, sorted, and the problems.
    """
    listed: list[str] = config["modules_to_save"] or []
    heads = TASK_HEADS.get(config["task_type"] or "", ())
    endings = tuple(dict.fromkeys((*listed, *heads)))
    leaves = _leaves(settings)
    saved: set[str] = set()
    stray, misfits = [], []
    for key, tensor in sorted(tensors.items()):
        name = from_peft_name(key)
        leaf = next((leaf for leaf in leaves if f".{name}".endswith(f".{leaf}")), None)
        if name == key:
            stray.append(key)
        elif leaf is not None:
            r = _rank(outermost(name.removesuffix(f".{leaf}")), config, settings)
            if not _has_rank(tensor, leaves[leaf], r, several=bool(config["target_parameters"])):
                misfits.append(f"{key} {tuple(tensor.shape)}")
        elif (module := _saved_module(name, endings)) is not None:
            saved.add(module)
        elif not name.endswith(f".{TOKENS}") and not _is_trained_bias(name, settings):
            stray.append(key)
    # PEFT lists the usual heads together, whichever of them the model has.
    optional = heads if set(heads) <= set(listed) else ()
    absent = [
        name
        for name in dict.fromkeys(listed)
        if name not in optional and not any(module.endswith(name) for module in saved)
    ]
    shared = _THEIR_NAMES.values() if settings.variant == "vera" else ()
    faults = {
        "must hold the factors that all layers share, but lacks": [
            key for key in shared if key not in tensors
        ],
        "must hold adapters and listed modules only, but also holds": stray,
        "must hold adapters of the rank that the config names, but holds": misfits,
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


def _leaves(settings: LoraSettings) -> dict[str, tuple[int, int] | None]:
    """Return the tensors that adapters of these settings can have."""
    if settings.variant == "adalora":
        return _ADALORA
    if settings.variant == "vera":
        return {**_VERA, **_SHARED}
    absent = set[str]()
    if settings.variant != "dora":
        absent.add("lora_magnitude_vector")
    if not settings.lora_bias:
        absent.add("lora_B.bias")
    return {leaf: axis for leaf, axis in _FACTORS.items() if leaf not in absent}


def _rank(layer: str, config: Mapping[str, Any], settings: LoraSettings) -> int:
    """Return the rank that the file must hold of a layer."""
    if settings.adalora is None:
        return settings.r_of(layer)
    masks = config["rank_pattern"] or {}
    names = (f"{layer}.lora_E", f"{layer}.lora_E.default")
    mask = next((masks[name] for name in names if name in masks), None)
    return settings.adalora.init_r if mask is None else sum(mask)


def _has_rank(
    tensor: torch.Tensor, place: tuple[int, int] | None, r: int, *, several: bool
) -> bool:
    if place is None:
        return True
    axis, axes = place
    if tensor.ndim < axes:
        return False
    # The factors of fused experts stand side by side, and which weight of a module they belong to
    # is for the model to say. B of a convolution in groups is as long as the rank of one group.
    found = tensor.shape[axis]
    in_groups = axis == 1 and tensor.ndim > axes and 0 < found < r and r % found == 0
    return several or found == r or in_groups


def _is_trained_bias(name: str, settings: LoraSettings) -> bool:
    ending = {"none": "\0", "lora_only": ".base_layer.bias", "all": ".bias"}[settings.bias]
    return name.endswith(ending)
