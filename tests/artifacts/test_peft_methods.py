import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import AdaLoraConfig, LoraConfig, VeraConfig

from lora_cli.artifacts.peft_methods import (
    METHODS,
    default_config,
    method_fields,
    peft_type,
    read_settings,
)
from lora_cli.lora.settings import AdaLoraSettings, LoraSettings

PEFT: dict[str, Any] = {
    "ADALORA": AdaLoraConfig(target_modules=["query"], total_step=10),
    "LORA": LoraConfig(target_modules=["query"]),
    "VERA": VeraConfig(target_modules=["query"]),
}
PLAN = AdaLoraSettings(
    init_r=9,
    total_steps=50,
    warmup_steps=5,
    final_steps=7,
    every=3,
    beta1=0.6,
    beta2=0.7,
    orthogonal=0.25,
)
SETTINGS = {
    "lora": LoraSettings(r=3, alpha=4.5, dropout=0.25, bias="lora_only", rslora=True),
    "dora": LoraSettings(r=3, alpha=6.0, variant="dora", rank_pattern={"x.query": 7}),
    "lora_bias": LoraSettings(r=3, alpha=6.0, lora_bias=True, alpha_pattern={"x.query": 7.5}),
    "adalora": LoraSettings(r=3, alpha=4.5, variant="adalora", adalora=PLAN, bias="all"),
    "vera": LoraSettings(
        r=3,
        alpha=1.0,
        variant="vera",
        dropout=0.125,
        bias="lora_only",
        d_initial=0.5,
        projection_seed=2**40,
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_fields_and_defaults_are_those_of_peft(method: str, tmp_path: Path) -> None:
    PEFT[method].save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = default_config(method)
    for config in (theirs, ours):
        for name in ("peft_version", "target_modules", "inference_mode", "total_step"):
            config.pop(name, None)
    assert ours == theirs


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings_there_and_back(settings: LoraSettings) -> None:
    fields = method_fields(settings, ["x.query", "x.value"])
    config = default_config(peft_type(settings)) | fields
    # Every field that is written is one that PEFT has.
    assert config.keys() == default_config(peft_type(settings)).keys()
    assert read_settings(config) == settings


def test_peft_reads_our_fields() -> None:
    ada = AdaLoraConfig(**method_fields(SETTINGS["adalora"], []))
    assert (ada.init_r, ada.target_r, ada.tinit, ada.tfinal, ada.deltaT) == (9, 3, 5, 7, 3)
    assert (ada.beta1, ada.beta2, ada.orth_reg_weight, ada.total_step) == (0.6, 0.7, 0.25, 50)
    vera = VeraConfig(**method_fields(SETTINGS["vera"], []))
    assert (vera.r, vera.projection_prng_key, vera.bias) == (3, 2**40, "vera_only")


def test_lora_fa_is_written_as_lora() -> None:
    assert peft_type(replace(SETTINGS["lora"], variant="lora_fa")) == "LORA"


def test_adalora_without_a_schedule_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="schedule"):
        method_fields(replace(SETTINGS["adalora"], adalora=None), [])
