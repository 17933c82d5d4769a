"""A merge that names alone tell of: what it is, and what it leaves to those who know the model."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_cli.artifacts.merge_names import FAMILIES, CannotStreamError, plan_by_names
from lora_cli.artifacts.merge_plan import Piece
from lora_cli.artifacts.peft_format import PeftAdapter
from lora_cli.artifacts.tensor_files import StoredWeights, read_weights
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.updates import LowRank, Rescaled
from lora_cli.tasks.table import FAMILIES as EVERY_FAMILY

SETTINGS = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
STATE = {"layers.0.q.lora_A.weight": torch.ones(2, 4), "layers.0.q.lora_B.weight": torch.ones(6, 2)}
ADAPTER = PeftAdapter(
    settings=LoraSettings(r=2, alpha=8),
    targets=("q",),
    saved_modules=(),
    task_type=None,
    base_name=None,
    revision=None,
    state=STATE,
)


@pytest.fixture
def weights(tmp_path: Path) -> StoredWeights:
    tensors = {"layers.0.q.weight": torch.zeros(6, 4), "layers.0.norm": torch.zeros(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    return read_weights(tmp_path)


def plan(
    weights: StoredWeights,
    folder: Path,
    adapter: PeftAdapter = ADAPTER,
    settings: Mapping[str, Any] = SETTINGS,
    **config: object,
) -> list[Piece]:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return plan_by_names(adapter, weights, settings, folder)


def test_layers_change_and_the_rest_stays(weights: StoredWeights, tmp_path: Path) -> None:
    pieces = {piece.name: piece for piece in plan(weights, tmp_path)}
    assert pieces["layers.0.norm"].change is None
    change = pieces["layers.0.q.weight"].change
    assert isinstance(change, LowRank)
    assert change.scale == 4
    dora = replace(
        ADAPTER,
        settings=replace(ADAPTER.settings, variant="dora"),
        state={**STATE, "layers.0.q.lora_magnitude_vector": torch.ones(6)},
    )
    changes = [piece.change for piece in plan(weights, tmp_path, dora)]
    assert any(isinstance(change, Rescaled) for change in changes)


def with_state(**state: torch.Tensor) -> PeftAdapter:
    return replace(ADAPTER, state={**STATE, **state})


@pytest.mark.parametrize(
    ("adapter", "settings", "why"),
    [
        (replace(ADAPTER, saved_modules=("head",)), {}, "trained whole"),
        (replace(ADAPTER, tokens={"e": (1,)}), {}, "rows of tokens"),
        (replace(ADAPTER, target_parameters=("up",)), {}, "fused weights"),
        (replace(ADAPTER, settings=LoraSettings(r=2, alpha=8, bias="all")), {}, "biases"),
        (replace(ADAPTER, settings=LoraSettings(r=2, alpha=8, variant="vera")), {}, "variant"),
        (replace(ADAPTER, settings=LoraSettings(r=3, alpha=8)), {}, "another rank"),
        (with_state(**{"layers.0.q.bias": torch.ones(6)}), {}, "more than updates"),
        (with_state(**{"layers.0.q.lora_A.weight": torch.ones(2, 5)}), {}, "another shape"),
        (with_state(**{"x.lora_A.weight": torch.ones(2, 4)}), {}, "called otherwise"),
        (
            with_state(**{"layers.0.q.lora_A.weight": torch.full((2, 4), torch.inf)}),
            {},
            "not finite",
        ),
        (ADAPTER, {"architectures": ["LlamaModel"]}, "no language model"),
        (ADAPTER, {"architectures": None}, "no language model"),
    ],
)
def test_all_else_is_left_to_the_model(
    weights: StoredWeights,
    tmp_path: Path,
    adapter: PeftAdapter,
    settings: dict[str, Any],
    why: str,
) -> None:
    with pytest.raises(CannotStreamError, match=why):
        plan(weights, tmp_path, adapter, {**SETTINGS, **settings})


def test_transposed_layers_are_left_to_the_model(weights: StoredWeights, tmp_path: Path) -> None:
    with pytest.raises(CannotStreamError, match="transposed"):
        plan(weights, tmp_path, fan_in_fan_out=True)


def test_the_families_keep_the_settings_of_their_base() -> None:
    for name in FAMILIES:
        family = EVERY_FAMILY[name]
        assert family.auto_class == "AutoModelForCausalLM"
        assert family.model_options({}) == {}
        assert family.processor == "tokenizer"
        assert family.fit_processor("as it was", {}) == "as it was"
