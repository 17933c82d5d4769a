import re
import subprocess
import sys
from functools import cache
from typing import Any

import peft.utils.constants
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from lora_cli.lora.kinds import is_linear, kind_of
from lora_cli.lora.targets import resolve_targets
from lora_cli.models.families import AUTO_TARGETS, auto_targets

PEFT = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
# What the default configuration lacks.
SETTINGS: dict[str, dict[str, Any]] = {
    # Their own backbone is one of timm.
    **{
        name: {"backbone_config": {"model_type": "resnet"}}
        for name in ("conditional_detr", "detr", "table-transformer")
    },
    "encoder-decoder": {
        "encoder": {"model_type": "bert"},
        "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
    },
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "nemotron_h": {"layers_block_type": ["attention", "mamba"]},
}


@cache
def build_on_meta(model_type: str) -> torch.nn.Module:
    """The family's default size, with names and shapes but no numbers."""
    with torch.device("meta"):
        config = AutoConfig.for_model(model_type, **SETTINGS.get(model_type, {}))
        # It has no model without a head.
        auto = AutoModelForSeq2SeqLM if model_type == "encoder-decoder" else AutoModel
        return auto.from_config(config)


def auto_names(model_type: str) -> tuple[str, ...]:
    return resolve_targets(
        build_on_meta(model_type),
        targets="auto",
        exclude=(),
        auto=auto_targets(model_type),
        saved_modules=(),
    ).names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", AUTO_TARGETS)
def test_every_name_is_a_layer_of_the_family(model_type: str) -> None:
    targets = auto_targets(model_type)
    assert targets
    model = build_on_meta(model_type)
    resolved = resolve_targets(model, targets="auto", exclude=(), auto=targets, saved_modules=())
    # By default BLIP-2 speaks through OPT; "q" and "v" are for T5.
    absent = {"q", "v"} if model_type == "blip-2" else set()
    assert set(resolved.counts) == set(targets) - absent
    assert min(resolved.counts.values()) >= 1
    assert {kind_of(model.get_submodule(name)) for name in resolved.names} <= {"linear", "conv1d"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", sorted(PEFT.keys() & CONFIG_MAPPING_NAMES.keys()))
def test_every_family_of_peft_gets_the_layers_that_peft_adapts(model_type: str) -> None:
    theirs, model = PEFT[model_type], build_on_meta(model_type)
    expected = tuple(
        name
        for name, module in model.named_modules()
        if is_linear(module)
        and (
            re.fullmatch(theirs, name)
            if isinstance(theirs, str)
            else any(name.endswith(f".{suffix}") for suffix in theirs)
        )
    )
    assert expected
    assert auto_names(model_type) == expected


def test_families_of_peft_that_are_left_out_are_not_in_transformers() -> None:
    missing = PEFT.keys() - AUTO_TARGETS.keys()
    assert missing == {"chatglm", "RefinedWebModel", "RefinedWeb", "btlm", "rwkv7"}
    assert not missing & CONFIG_MAPPING_NAMES.keys()


def test_unknown_family_has_none() -> None:
    assert auto_targets("resnet") is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "model_type", [name for name, targets in AUTO_TARGETS.items() if "_model." in targets[0]]
)
def test_what_looks_at_images_is_left_alone(model_type: str) -> None:
    names = auto_names(model_type)
    assert names
    assert not [name for name in names if "vision" in name or "visual" in name]


def test_table_loads_without_torch() -> None:
    code = "import sys, lora_cli.models.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
