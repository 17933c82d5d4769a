"""Where an adapter of a language model goes in the files of its base, told by names alone.

No model is built and transformers is not asked, which takes seconds and hundreds of megabytes: the
layers of the adapter are called in the files as they are in the model, or this is not tried. What
transformers changes when it loads a matrix, it renames as well.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_cli.artifacts.merge_plan import Piece, changed, untouched
from lora_cli.artifacts.peft_config import CONFIG_FILE
from lora_cli.artifacts.peft_format import PeftAdapter
from lora_cli.artifacts.tensor_files import StoredWeights
from lora_cli.lora.settings import scale_of
from lora_cli.lora.updates import Change, LowRank, Rescaled

# Families whose head is that of every language model, and which keep tokenizer and settings.
FAMILIES = ("causal_language_modeling",)
_VARIANTS = ("lora", "lora_fa", "dora")
_A, _B, _M = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


class CannotStreamError(Exception):
    """A merge cannot go tensor by tensor; the message says why, as the end of a sentence."""


def plan_by_names(
    adapter: PeftAdapter, weights: StoredWeights, settings: Mapping[str, Any], folder: Path
) -> list[Piece]:
    """Return the tensors of the merged model.

    Args:
        adapter: Low-rank updates of a language model.
        weights: The headers of the base.
        settings: What its config.json says.
        folder: The adapter's.

    Raises:
        CannotStreamError: If names do not tell it all.
    """
    _check_kind(adapter, settings, folder)
    changes: dict[str, Change] = {}
    for name in sorted(n.removesuffix(_A) for n in adapter.state if n.endswith(_A)):
        weight = f"{name}.weight"
        changes[weight] = _change(adapter, name, weights, weight)
    if 2 * len(changes) + _magnitudes(adapter) != len(adapter.state):
        raise CannotStreamError("it holds more than updates of linear layers")
    return [
        changed(tensor, changes[name]) if name in changes else untouched(tensor)
        for name, tensor in weights.tensors.items()
    ]


def _check_kind(adapter: PeftAdapter, settings: Mapping[str, Any], folder: Path) -> None:
    architectures = settings.get("architectures") or [""]
    reasons = {
        "its variant is another": adapter.settings.variant not in _VARIANTS,
        "it holds modules that were trained whole": bool(adapter.saved_modules),
        "it holds rows of tokens": bool(adapter.tokens),
        "it adapts fused weights": bool(adapter.target_parameters),
        "it trained biases": adapter.settings.bias != "none" or adapter.settings.lora_bias,
        "its layers are stored transposed": _is_transposed(folder),
        "the base is no language model": not str(architectures[0]).endswith("ForCausalLM"),
    }
    if found := [reason for reason, is_so in reasons.items() if is_so]:
        raise CannotStreamError(found[0])


def _is_transposed(folder: Path) -> bool:
    return bool(json.loads((folder / CONFIG_FILE).read_bytes()).get("fan_in_fan_out"))


def _change(adapter: PeftAdapter, name: str, weights: StoredWeights, weight: str) -> Change:
    stored = weights.tensors.get(weight)
    A, B = adapter.state[name + _A], adapter.state.get(name + _B)
    magnitude = adapter.state.get(name + _M)
    if stored is None or B is None or "embed" in name or name.endswith("lm_head"):
        raise CannotStreamError(f"{name} may be called otherwise in the files, or be shared")
    if A.ndim != 2 or stored.shape != (B.shape[0], A.shape[1]) or stored.dtype is None:
        raise CannotStreamError(f"{name} has another shape in the files")
    for tensor in (A, B, *([] if magnitude is None else [magnitude])):
        if not bool(torch.isfinite(tensor).all()):
            raise CannotStreamError(f"the update of {name} is not finite")
    settings = adapter.settings
    r, alpha = settings.r_of(name), settings.alpha_of(name)
    if A.shape[0] != r or B.shape[1] != r or (magnitude is None) == (settings.variant == "dora"):
        raise CannotStreamError(f"the update of {name} is of another rank or variant")
    scale = scale_of(r, alpha, rslora=settings.rslora)
    if magnitude is None:
        return LowRank(A, B, scale)
    return Rescaled(A, B, scale, magnitude.flatten())


def _magnitudes(adapter: PeftAdapter) -> int:
    return sum(name.endswith(_M) for name in adapter.state)
