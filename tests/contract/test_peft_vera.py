"""VeRA against PEFT: start, training, merge, and files both ways."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from lora_cli.artifacts.peft_format import PeftAdapter, load_peft, peft_files
from lora_cli.errors import UserError
from lora_cli.lora.inject import freeze_base, inject_lora, trainable_parameters
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.state import adapter_state, load_adapter_state
from lora_cli.lora.targets import match_targets
from lora_cli.lora.vera import SHARED_NAME

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]


SETTINGS = LoraSettings(r=5, alpha=1.0, variant="vera", d_initial=0.3, projection_seed=11)


TARGETS = {"bert": ("query", "dense"), "gpt2": ("c_attn", "c_proj", "c_fc")}


HEAD = {"bert": "classifier", "gpt2": "score"}


def build_base(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "bert":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        config = BertConfig(vocab_size=40, num_attention_heads=2, num_labels=3, **sizes)
        return BertForSequenceClassification(config).eval()
    gpt2 = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0
    )
    return GPT2ForSequenceClassification(gpt2).eval()


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "input_ids": torch.randint(1, 40, (6, 7), generator=generator),
        "labels": torch.randint(0, 3, (6,), generator=generator),
    }


def build_ours(family: str, settings: LoraSettings = SETTINGS) -> nn.Module:
    base = build_base(family)
    names = match_targets(base, targets=TARGETS[family], saved_modules=(HEAD[family],))
    inject_lora(base, names, settings)
    freeze_base(base, (HEAD[family],), bias=settings.bias)
    return base


def shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def gap(one: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        return (one(**batch()).logits - other(**batch()).logits).abs().max().item()


def build_peft(family: str, bias: str = "none") -> PeftModel:
    config = VeraConfig(
        r=5,
        d_initial=0.3,
        projection_prng_key=11,
        target_modules=list(TARGETS[family]),
        modules_to_save=[HEAD[family]],
        task_type="SEQ_CLS",
        bias=bias,
    )
    return get_peft_model(build_base(family), config).eval()


def plain_name(name: str) -> str:
    name = name.removeprefix("base_model.model.").removesuffix(".default")
    return name.replace(".modules_to_save.default", "")


def their_trained(model: PeftModel) -> dict[str, nn.Parameter]:
    return {plain_name(n): p for n, p in model.named_parameters() if p.requires_grad}


def write(folder: Path, model: nn.Module, settings: LoraSettings, family: str) -> None:
    folder.mkdir(parents=True)
    adapter = PeftAdapter(
        settings=settings,
        targets=(),
        saved_modules=(HEAD[family],),
        task_type="SEQ_CLS",
        base_name=None,
        revision=None,
        fan_in_fan_out=family == "gpt2",
        state=adapter_state(model, (HEAD[family],)),
    )
    modules = [name for name, _ in build_base(family).named_modules()]
    for name, content in peft_files(adapter, module_names=modules).items():
        (folder / name).write_bytes(content)


def load_ours(folder: Path, family: str) -> tuple[nn.Module, PeftAdapter]:
    adapter = load_peft(folder)
    base = build_base(family)
    names = match_targets(base, targets=adapter.targets, saved_modules=adapter.saved_modules)
    inject_lora(base, names, adapter.settings)
    freeze_base(base, adapter.saved_modules, bias=adapter.settings.bias)
    load_adapter_state(base, adapter.state, adapter.saved_modules)
    return base, adapter


@pytest.mark.parametrize("family", TARGETS)
def test_same_start_as_peft(family: str) -> None:
    ours, theirs = build_ours(family), build_peft(family)
    shared = ours.get_submodule(SHARED_NAME)
    assert torch.equal(shared.A, theirs.base_model.vera_A["default"])
    assert torch.equal(shared.B, theirs.base_model.vera_B["default"])
    assert gap(ours, build_base(family)) == 0.0
    mine, other = trainable_parameters(ours), their_trained(theirs)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("family", TARGETS)
def test_same_training_files_and_merge_as_peft(family: str, tmp_path: Path) -> None:
    ours, theirs = build_ours(family), build_peft(family)
    shake(ours)
    mine, other = trainable_parameters(ours), their_trained(theirs)
    with torch.no_grad():
        for name, parameter in mine.items():
            other[name].copy_(parameter)
    optimizers = [torch.optim.SGD(p.values(), lr=0.05) for p in (mine, other)]
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(**batch()).loss.backward()
            optimizer.step()
        for name, parameter in mine.items():
            torch.testing.assert_close(parameter.grad, other[name].grad, rtol=1e-4, atol=1e-5)
    assert gap(ours, build_base(family)) > 1e-2
    assert gap(ours, theirs) <= 1e-5

    theirs.save_pretrained(tmp_path / "theirs")
    write(tmp_path / "ours", ours, SETTINGS, family)
    states = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert "base_model.vera_A" in states[0]
    assert {k: (t.shape, t.dtype) for k, t in states[0].items()} == {
        k: (t.shape, t.dtype) for k, t in states[1].items()
    }
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        loaded, _ = load_ours(tmp_path / folder, family)
        peft_model = PeftModel.from_pretrained(build_base(family), tmp_path / folder).eval()
        assert gap(ours, loaded) <= 1e-5
        assert gap(ours, peft_model) <= 1e-5
        merge_lora(loaded)
        assert gap(peft_model.merge_and_unload(), loaded) <= 1e-5
        assert gap(ours, loaded) <= 1e-5
        assert loaded.state_dict().keys() == build_base(family).state_dict().keys()


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    config.pop("peft_version")
    config["modules_to_save"] = {*config["modules_to_save"], "classifier", "score"}
    config["target_modules"] = sorted(config["target_modules"])
    return config


@pytest.mark.parametrize(("ours", "theirs"), [("lora_only", "vera_only"), ("all", "all")])
def test_biases_are_trained_as_in_peft(ours: str, theirs: str, tmp_path: Path) -> None:
    peft_model = build_peft("bert", bias=theirs)
    shake(peft_model)
    peft_model.save_pretrained(tmp_path / "theirs")
    loaded, adapter = load_ours(tmp_path / "theirs", "bert")
    assert adapter.settings.bias == ours
    assert gap(loaded, peft_model) <= 1e-5
    write(tmp_path / "ours", loaded, adapter.settings, "bert")
    assert gap(PeftModel.from_pretrained(build_base("bert"), tmp_path / "ours"), loaded) <= 1e-5


def test_factors_larger_than_the_layers_need(tmp_path: Path) -> None:
    """Older releases of PEFT sized them by every layer that a target names, the head's included."""
    model = build_ours("bert")
    shake(model)
    write(tmp_path / "a", model, SETTINGS, "bert")
    state = load_file(tmp_path / "a/adapter_model.safetensors")
    A, B = state["base_model.vera_A"], state["base_model.vera_B"]
    padding = {"base_model.vera_A": torch.cat([A, torch.ones(5, 3)], dim=1)}
    padding["base_model.vera_B"] = torch.cat([B, torch.ones(2, 5)])
    change(tmp_path / "a", **padding)
    loaded, adapter = load_ours(tmp_path / "a", "bert")
    assert adapter.settings.projection_sizes == (27, 26)
    assert gap(model, loaded) == 0.0


def test_settings_survive_the_file(tmp_path: Path) -> None:
    settings = replace(SETTINGS, dropout=0.25, bias="lora_only")
    model = build_ours("bert", settings)
    write(tmp_path / "a", model, settings, "bert")
    loaded = load_peft(tmp_path / "a")
    assert loaded.settings == replace(settings, projection_sizes=(24, 24))
    state = adapter_state(model, ("classifier",))
    assert loaded.state.keys() == state.keys()
    assert all(torch.equal(loaded.state[name], state[name]) for name in state)


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    from safetensors.torch import save_file

    path = folder / "adapter_model.safetensors"
    state: dict[str, Any] = {**load_file(path), **tensors}
    save_file({name: t for name, t in state.items() if t is not None}, path)


@pytest.mark.parametrize(
    ("key", "tensor", "found"),
    [
        ("base_model.vera_A", None, "base_model.vera_A"),
        ("base_model.vera_B", torch.zeros(24, 4), r"\(24, 4\)"),
        ("base_model.model.vera_shared.A", torch.zeros(5, 24), "vera_shared"),
        ("base_model.model.x.lora_A.weight", torch.zeros(5, 24), "lora_A"),
    ],
)
def test_wrong_factors_are_refused(
    key: str, tensor: torch.Tensor | None, found: str, tmp_path: Path
) -> None:
    write(tmp_path / "a", build_ours("bert"), SETTINGS, "bert")
    change(tmp_path / "a", **{key: tensor})
    with pytest.raises(UserError, match=found):
        load_peft(tmp_path / "a")


def test_factors_smaller_than_a_layer_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", build_ours("bert"), SETTINGS, "bert")
    change(tmp_path / "a", **{"base_model.vera_A": torch.zeros(5, 20)})
    with pytest.raises(UserError, match=r"vera_shared.A \(5, 20\) instead of \(5, 24\)"):
        load_ours(tmp_path / "a", "bert")


def test_few_parameters_are_trained_and_few_numbers_kept_for_backward() -> None:
    """No more tensors than PEFT's layer keeps."""
    ours, theirs = build_ours("bert"), build_peft("bert")
    assert sum(p.numel() for p in trainable_parameters(ours).values()) == sum(
        p.numel() for p in their_trained(theirs).values()
    )

    def kept(model: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**batch())
        return sum(sizes.values())

    assert 0 < kept(ours) <= kept(theirs)
