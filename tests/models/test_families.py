import subprocess
import sys

import peft.utils.constants
import pytest
import torch
from transformers import AutoConfig, AutoModel

from lora_cli.lora.targets import resolve_targets
from lora_cli.models.families import AUTO_TARGETS, auto_targets


def build_on_meta(model_type: str) -> torch.nn.Module:
    """The family's default size, with names and shapes but no numbers."""
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.for_model(model_type))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", AUTO_TARGETS)
def test_every_name_is_a_layer_of_the_family(model_type: str) -> None:
    targets = auto_targets(model_type)
    assert targets
    model = build_on_meta(model_type)
    resolved = resolve_targets(model, targets="auto", exclude=(), auto=targets, saved_modules=())
    assert set(resolved.counts) == set(targets)
    assert min(resolved.counts.values()) >= 1


def test_same_as_peft_where_peft_has_the_family() -> None:
    theirs = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    shared = AUTO_TARGETS.keys() & theirs.keys()
    assert len(shared) >= 20
    for model_type in shared:
        assert list(AUTO_TARGETS[model_type]) == theirs[model_type], model_type


def test_unknown_family_has_none() -> None:
    assert auto_targets("gpt2") is None


def test_gemma3_leaves_the_vision_tower_alone() -> None:
    names = resolve_targets(
        build_on_meta("gemma3"),
        targets="auto",
        exclude=(),
        auto=auto_targets("gemma3"),
        saved_modules=(),
    ).names
    assert names
    assert not [name for name in names if "vision" in name]


def test_table_loads_without_torch() -> None:
    code = "import sys, lora_cli.models.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
