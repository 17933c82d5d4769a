"""Adapter folders with random updates, as `lora-cli train` would write them, without training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_cli.artifacts.adapter import AdapterRecord, save_adapter
from lora_cli.artifacts.peft_format import PeftAdapter
from lora_cli.config.adapters import LoraConfig
from lora_cli.config.commands import TrainConfig
from lora_cli.config.language import CausalLanguageModelingConfig
from lora_cli.config.schema import to_plain
from lora_cli.config.sections import ModelConfig
from lora_cli.lora.experts import inject_experts, match_parameters
from lora_cli.lora.inject import freeze_base, inject_lora, saved_modules
from lora_cli.lora.kinds import is_conv1d
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.state import adapter_state
from lora_cli.lora.targets import match_targets
from lora_cli.lora.tokens import prepare_tokens, put_tokens
from lora_cli.models.base import load_base, load_tokenizer
from lora_cli.models.sources import resolve_model


def store(base: Path, folder: Path, *, dtype: str, shard_size: str = "50GB") -> Path:
    """Write a language model again, in another number format and in files of this size."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard_size)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def make_adapter(
    folder: Path,
    base: Path,
    settings: LoraSettings,
    *,
    targets: Sequence[str] = (),
    parameters: Sequence[str] = (),
    whole: tuple[str, ...] = (),
    tokens: tuple[str, ...] = (),
) -> Path:
    """Write an adapter of a language model with random values, and return its folder."""
    source = resolve_model(str(base))
    loaded = load_base(source, auto_class="AutoModelForCausalLM", options={}, dtype="auto", seed=0)
    model: Any = loaded.model
    trained = prepare_tokens(model, load_tokenizer(source), tokens, seed=0)
    saved = saved_modules(model, loaded.new_keys, whole)
    names = match_targets(
        model,
        targets=tuple(targets),
        exclude=(),
        saved_modules=saved,
        variant=settings.variant,
        layers=None,
        layers_pattern=(),
    )
    fused = match_parameters(model, parameters, saved_modules=saved)
    torch.manual_seed(1)
    inject_lora(model, names, settings)
    inject_experts(model, fused, settings)
    put_tokens(model, trained)
    freeze_base(model, saved, bias=settings.bias)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    adapter = PeftAdapter(
        settings=settings,
        targets=tuple(names),
        saved_modules=saved,
        task_type="CAUSAL_LM",
        base_name=str(base),
        revision=None,
        target_parameters=tuple(parameters),
        tokens=trained,
        fan_in_fan_out=any(is_conv1d(model.get_submodule(name).base_layer) for name in names),
        state=adapter_state(model, saved),
    )
    config = TrainConfig(
        model=ModelConfig(path=str(base)),
        task=CausalLanguageModelingConfig(),
        lora=replace(LoraConfig(), r=settings.r, trainable_tokens=tokens),
    )
    record = AdapterRecord(
        config=to_plain(config),
        state={"columns": {"text": "text"}},
        base={"name": str(base), "revision": None, **source.hashes},
        metrics={},
    )
    save_adapter(folder, adapter, record, card="", module_names=())
    return folder
