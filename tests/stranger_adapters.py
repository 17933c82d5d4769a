"""Adapter folders as other programs write them, sound or broken, made by hand."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lora_cli.artifacts.inspection import BaseShapes, Inspected, inspect_adapter
from lora_cli.artifacts.portability import EVERY, Finding, find_problems
from lora_cli.artifacts.portability_table import RULES

PREFIX = "base_model.model."
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/model",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
}


def factors(layer: str = "model.layers.0.self_attn.q_proj", r: int = 4) -> dict[str, Any]:
    """The two tensors of a layer with 16 inputs and 12 outputs."""
    return {
        f"{PREFIX}{layer}.lora_A.weight": torch.ones(r, 16),
        f"{PREFIX}{layer}.lora_B.weight": torch.ones(12, r),
    }


def write_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
    **changes: Any,
) -> Path:
    """Write a folder; a field of the config that is changed to `...` is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {key: value for key, value in {**CONFIG, **changes}.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    named = factors() if tensors is None else dict(tensors)
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def look(folder: Path, base: BaseShapes | None = None) -> Inspected:
    """Read a folder as the command does."""
    return replace(inspect_adapter(folder), base=base)


def findings(folder: Path, *runtimes: str, base: BaseShapes | None = None) -> list[Finding]:
    """Return what the rules find, for all programs where none is named."""
    return find_problems(look(folder, base), RULES, runtimes or EVERY)


def ids(folder: Path, *runtimes: str, base: BaseShapes | None = None) -> set[str]:
    """Return the names of the rules that find something."""
    return {finding.id for finding in findings(folder, *runtimes, base=base)}


def errors(folder: Path, *runtimes: str, base: BaseShapes | None = None) -> set[str]:
    """Return those whose findings are errors."""
    found = findings(folder, *runtimes, base=base)
    return {finding.id for finding in found if finding.severity == "error"}
