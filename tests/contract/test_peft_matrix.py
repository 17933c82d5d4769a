"""Every architecture and variant against PEFT: files, outputs, gradients, merged weights."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel

from lora_cli.artifacts.peft_format import PeftAdapter, load_peft, peft_files
from lora_cli.lora.inject import freeze_base, inject_lora, trainable_parameters
from lora_cli.lora.kinds import is_conv1d
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.state import adapter_state, load_adapter_state
from lora_cli.lora.targets import match_targets
from lora_cli.models.families import auto_targets

# peft 0.21 asks transformers for a property that transformers 5 has renamed, tells of layers of
# GPT-2 that it treats rightly, and of a head that the bare models here do not have.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

_TEXT = {
    "vocab_size": 48,
    "hidden_size": 16,
    "embedding_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IMAGE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Family:
    """A tiny architecture, and layers of it beyond the usual ones."""

    sizes: dict[str, Any]
    kind: str = "text"
    extra: tuple[str, ...] = ()
    model_type: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "bert": Family(_TEXT, extra=("word_embeddings", "dense")),
    "roberta": Family(_TEXT),
    "deberta-v2": Family(_TEXT),
    "distilbert": Family(
        {"vocab_size": 48, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}
    ),
    "gpt2": Family(
        {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
        | {"bos_token_id": 1, "eos_token_id": 2},
        extra=("c_proj", "wte"),
    ),
    "llama": Family(_TEXT, extra=("embed_tokens", "down_proj")),
    "qwen3": Family(_TEXT),
    "gemma3_text": Family(_TEXT, extra=("embed_tokens",)),
    "t5": Family(
        {"vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        | {"decoder_start_token_id": 0},
        kind="pair",
        extra=("wo",),
    ),
    "bart": Family(
        {"vocab_size": 48, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
        | {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
        | {"decoder_attention_heads": 2, "max_position_embeddings": 40},
        kind="pair",
        extra=("fc1",),
    ),
    "vit": Family(_IMAGE, kind="image", extra=("projection",)),
    "dinov2": Family(_IMAGE | {"patch_size": 4}, kind="image", extra=("projection", "fc1")),
    "whisper": Family(
        {"vocab_size": 48, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
        | {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
        | {"decoder_attention_heads": 2, "num_mel_bins": 8, "max_source_positions": 10}
        | {"max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        | {"decoder_start_token_id": 3},
        kind="speech-pair",
        # PEFT's Conv1d lacks the attributes that Whisper reads of its convolutions.
        extra=("fc1",),
    ),
    "wav2vec2": Family(
        {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "conv_dim": [8, 8], "conv_kernel": [4, 3]}
        | {"conv_stride": [2, 2], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4}
        | {"num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0},
        kind="wave",
        # The first convolution is normalised: the true gradient of its length is zero, and what
        # float32 gives is noise.
        extra=("projection", "conv_layers.1.conv"),
    ),
    "mixtral": Family(_TEXT | {"num_local_experts": 3, "num_experts_per_tok": 2}),
}
VARIANTS: dict[str, tuple[LoraSettings, dict[str, Any]]] = {
    "lora": (LoraSettings(r=3, alpha=7.0), {}),
    "rslora": (LoraSettings(r=3, alpha=7.0, rslora=True), {"use_rslora": True}),
    "dora": (LoraSettings(r=3, alpha=7.0, variant="dora"), {"use_dora": True}),
    "patterns": (
        LoraSettings(r=3, alpha=7.0, rank_pattern={"PATTERN": 2}, alpha_pattern={"PATTERN": 5.0}),
        {"rank_pattern": {"PATTERN": 2}, "alpha_pattern": {"PATTERN": 5.0}},
    ),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(name, **FAMILIES[name].sizes)).eval()


def inputs(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids_BT = torch.randint(3, 40, (2, 7), generator=generator)
    noise = torch.randn(2, 3, 12, 12, generator=generator)
    return {
        "text": {"input_ids": ids_BT},
        "pair": {"input_ids": ids_BT, "decoder_input_ids": ids_BT.flip(1)[:, :5]},
        "image": {"pixel_values": noise},
        "speech-pair": {
            "input_features": noise.reshape(2, 8, -1)[..., :20],
            "decoder_input_ids": ids_BT[:, :5],
        },
        "wave": {"input_values": noise.reshape(2, -1)},
    }[kind]


def compute(model: nn.Module, name: str) -> torch.Tensor:
    output: torch.Tensor = model(**inputs(FAMILIES[name].kind)).last_hidden_state
    return output


def backward(model: nn.Module, name: str) -> torch.Tensor:
    output = compute(model, name)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (output * weights).sum().backward()
    return output.detach()


def shake(model: nn.Module) -> None:
    """Move every trained tensor off its start, so that nothing equal is equal by chance."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def targets_of(name: str) -> tuple[str, ...]:
    return (*(auto_targets(name) or ()), *FAMILIES[name].extra)


def concrete(name: str, variant: str) -> tuple[LoraSettings, dict[str, Any]]:
    """Return the settings of both sides, patterns about the family's first target."""
    ours, theirs = copy.deepcopy(VARIANTS[variant])
    if variant == "patterns":
        first = targets_of(name)[0]
        ours = LoraSettings(r=3, alpha=7.0, rank_pattern={first: 2}, alpha_pattern={first: 5.0})
        theirs = {"rank_pattern": {first: 2}, "alpha_pattern": {first: 5.0}}
    return ours, theirs


def attach(model: nn.Module, adapter: PeftAdapter) -> nn.Module:
    names = match_targets(model, targets=adapter.targets, saved_modules=())
    inject_lora(model, names, adapter.settings)
    freeze_base(model, ())
    load_adapter_state(model, adapter.state, ())
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_ours_in_peft(name: str, variant: str, tmp_path: Path) -> None:
    settings, _ = concrete(name, variant)
    ours = build(name)
    names = match_targets(ours, targets=targets_of(name), saved_modules=())
    module_names = [n for n, _ in ours.named_modules()]
    has_conv1d = any(is_conv1d(ours.get_submodule(n)) for n in names)
    inject_lora(ours, names, settings)
    freeze_base(ours, ())
    shake(ours)
    adapter = PeftAdapter(
        settings=settings,
        targets=names,
        saved_modules=(),
        task_type=None,
        base_name=None,
        revision=None,
        fan_in_fan_out=has_conv1d,
        state=adapter_state(ours, ()),
    )
    for file, content in peft_files(adapter, module_names=module_names).items():
        (tmp_path / file).write_bytes(content)
    theirs = PeftModel.from_pretrained(build(name), tmp_path, is_trainable=True).eval()

    assert torch.allclose(backward(ours, name), backward(theirs, name), atol=1e-5)
    gradients = {
        n.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    expected = {n.replace(".weight", ""): g for n, g in gradients.items()}
    found = {n.replace(".weight", ""): p.grad for n, p in trainable_parameters(ours).items()}
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert (gradient is None) == (expected[key] is None), key
        if gradient is not None:
            scale = max(1.0, float(gradient.abs().max()))
            assert torch.allclose(gradient, expected[key], atol=1e-5 * scale), key
    merge_lora(ours)
    merged = theirs.merge_and_unload().state_dict()
    assert ours.state_dict().keys() == merged.keys()
    for key, tensor in ours.state_dict().items():
        assert torch.allclose(tensor, merged[key], atol=1e-5), key


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_in_ours(name: str, variant: str, tmp_path: Path) -> None:
    settings, options = concrete(name, variant)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=list(targets_of(name)), **options)
    theirs = get_peft_model(build(name), config).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    adapter = load_peft(tmp_path / "theirs")
    assert (adapter.settings.r, adapter.settings.alpha) == (settings.r, settings.alpha)
    ours = attach(build(name), adapter)
    assert torch.allclose(compute(ours, name), compute(theirs, name), atol=1e-5)

    adapter = PeftAdapter(
        settings=adapter.settings,
        targets=adapter.targets,
        saved_modules=(),
        task_type=None,
        base_name=None,
        revision=None,
        state=adapter_state(ours, ()),
    )
    (tmp_path / "ours").mkdir()
    for file, content in peft_files(adapter).items():
        (tmp_path / "ours" / file).write_bytes(content)
    before, after = (
        load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours")
    )
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key]), key
