"""PEFT loads what we write, we load what PEFT writes, and both compute the same."""

import copy
import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from lora_cli.artifacts.peft_format import PeftAdapter, load_peft, peft_files
from lora_cli.lora.inject import freeze_base, inject_lora, saved_modules, trainable_parameters
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.state import adapter_state, load_adapter_state
from lora_cli.lora.targets import match_targets, resolve_targets
from lora_cli.models.families import auto_targets

# peft 0.21 asks transformers for a property that transformers 5 has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

# Prefixes of the parameters that a checkpoint of the bare encoder does not provide.
NEW = {
    "bert": ("classifier.",),
    "roberta": ("classifier.",),
    "deberta-v2": ("pooler.", "classifier."),
    "distilbert": ("pre_classifier.", "classifier."),
    "albert": ("classifier.",),
    "electra": ("classifier.",),
    "modernbert": ("head.", "classifier."),
}
SAVED = {
    "deberta-v2": ("pooler", "classifier"),
    "distilbert": ("pre_classifier", "classifier"),
    "modernbert": ("head", "classifier"),
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "embedding_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "global_attn_every_n_layers": 2,
    "pad_token_id": 0,
    "num_labels": 3,
}
R, ALPHA = 3, 7.0


def write_peft(folder: Path, adapter: PeftAdapter, *, module_names: Iterable[str] = ()) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in peft_files(adapter, module_names=module_names).items():
        (folder / name).write_bytes(content)


def build_base(family: str) -> nn.Module:
    if family == "distilbert":
        sizes = {"vocab_size": 64, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}
        config = AutoConfig.for_model(family, num_labels=3, max_position_embeddings=40, **sizes)
    else:
        known = AutoConfig.for_model(family)
        fitting = {k: v for k, v in SIZES.items() if hasattr(known, k)}
        config = AutoConfig.for_model(family, bos_token_id=1, eos_token_id=2, **fitting)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids_BT = torch.randint(3, 60, (4, 9), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 6:] = 0
    ids_BT[1, 6:] = 0
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": torch.tensor([0, 2, 1, 2])}


def shake(model: nn.Module) -> None:
    """Move every trained tensor off its start, so that nothing equal is equal by chance."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def build_ours(base: nn.Module, family: str) -> tuple[nn.Module, tuple[str, ...], tuple[str, ...]]:
    missing = [n for n, _ in base.named_parameters() if n.startswith(NEW[family])]
    saved = saved_modules(base, missing, ())
    assert saved == SAVED.get(family, ("classifier",))
    names = resolve_targets(
        base, targets="auto", exclude=(), auto=auto_targets(family), saved_modules=saved
    ).names
    inject_lora(base, names, LoraSettings(r=R, alpha=ALPHA, dropout=0.0))
    freeze_base(base, saved)
    shake(base)
    return base, names, saved


def build_peft(base: nn.Module, family: str) -> PeftModel:
    config = LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules=list(auto_targets(family) or ()),
        modules_to_save=list(SAVED.get(family, ("classifier",))),
        task_type="SEQ_CLS",
    )
    return get_peft_model(base, config).eval()


def adapter_of(
    model: nn.Module, names: tuple[str, ...], saved: tuple[str, ...], task_type: str | None
) -> PeftAdapter:
    return PeftAdapter(
        settings=LoraSettings(r=R, alpha=ALPHA, dropout=0.0),
        targets=names,
        saved_modules=saved,
        task_type=task_type,
        base_name=None,
        revision=None,
        model_class=f"{type(model).__module__}.{type(model).__name__}",
        state=adapter_state(model, saved),
    )


def load_with_peft(family: str, folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        # PEFT says so when a tensor is missing, and goes on.
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return PeftModel.from_pretrained(build_base(family), folder).eval()


def load_with_ours(family: str, folder: Path) -> nn.Module:
    base = build_base(family)
    adapter = load_peft(folder)
    saved = adapter.saved_modules
    names = match_targets(
        base, targets=adapter.targets, exclude=adapter.exclude, saved_modules=saved
    )
    inject_lora(base, names, adapter.settings)
    freeze_base(base, saved)
    load_adapter_state(base, adapter.state, saved)
    return base


def gap(one: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        return (one(**batch()).logits - other(**batch()).logits).abs().max().item()


@pytest.mark.parametrize("short", [True, False], ids=["short-names", "full-paths"])
@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
@pytest.mark.parametrize("family", NEW)
def test_peft_loads_ours(family: str, task_type: str | None, short: bool, tmp_path: Path) -> None:
    modules = [name for name, _ in build_base(family).named_modules()] if short else []
    ours, names, saved = build_ours(build_base(family), family)
    write_peft(tmp_path, adapter_of(ours, names, saved, task_type), module_names=modules)
    theirs = load_with_peft(family, tmp_path)
    assert gap(ours, build_base(family)) > 1e-2
    assert gap(ours, theirs) <= 1e-5
    wrapped = {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert wrapped == set(names)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == task_type
    expected = sorted(auto_targets(family) or ()) if short else sorted(names)
    assert config["target_modules"] == expected


@pytest.mark.parametrize("family", NEW)
def test_we_load_theirs(family: str, tmp_path: Path) -> None:
    theirs = build_peft(build_base(family), family)
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_with_ours(family, tmp_path)
    assert gap(theirs, build_base(family)) > 1e-2
    assert gap(ours, theirs) <= 1e-5


@pytest.mark.parametrize("family", NEW)
def test_files_hold_what_peft_writes(family: str, tmp_path: Path) -> None:
    theirs = build_peft(build_base(family), family)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, names, saved = build_ours(build_base(family), family)
    modules = [name for name, _ in build_base(family).named_modules()]
    write_peft(tmp_path / "ours", adapter_of(ours, names, saved, "SEQ_CLS"), module_names=modules)
    their_state = load_file(tmp_path / "theirs/adapter_model.safetensors")
    our_state = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in our_state.items()} == {
        k: (v.shape, v.dtype) for k, v in their_state.items()
    }
    their_config = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    our_config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    for config in (their_config, our_config):
        config.pop("peft_version")
        # PEFT adds the usual heads by itself when it reads the file.
        config["modules_to_save"] = {*config["modules_to_save"], "classifier", "score"}
        config["target_modules"] = sorted(config["target_modules"])
    assert our_config == their_config


@pytest.mark.parametrize("family", NEW)
def test_same_merge_and_gradients(family: str, tmp_path: Path) -> None:
    ours, names, saved = build_ours(build_base(family), family)
    write_peft(tmp_path, adapter_of(ours, names, saved, "SEQ_CLS"))
    theirs = PeftModel.from_pretrained(build_base(family), tmp_path, is_trainable=True).eval()

    ours(**batch()).loss.backward()
    theirs(**batch()).loss.backward()
    their_gradients = {
        name.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace(".modules_to_save", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    our_parameters = trainable_parameters(ours)
    assert our_parameters.keys() == their_gradients.keys()
    for name, parameter in our_parameters.items():
        torch.testing.assert_close(parameter.grad, their_gradients[name], rtol=1e-5, atol=1e-7)

    merged = copy.deepcopy(ours)
    merge_lora(merged)
    their_state = theirs.merge_and_unload().state_dict()
    our_state = merged.state_dict()
    assert our_state.keys() == their_state.keys()
    for name, tensor in our_state.items():
        assert torch.equal(tensor, their_state[name]), name
    assert gap(merged, ours) <= 1e-5


def test_peft_loads_a_file_without_a_saved_head(tmp_path: Path) -> None:
    # With SEQ_CLS PEFT would look for the head in the file and stop with a KeyError.
    base = build_base("bert")
    names = match_targets(base, targets=("query",), saved_modules=())
    inject_lora(base, names, LoraSettings(r=R, alpha=ALPHA, dropout=0.0))
    freeze_base(base, ())
    shake(base)
    write_peft(tmp_path, adapter_of(base, names, (), "SEQ_CLS"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] is None
    assert config["auto_mapping"] == {
        "base_model_class": "BertForSequenceClassification",
        "parent_library": "transformers.models.bert.modeling_bert",
    }
    assert gap(base, load_with_peft("bert", tmp_path)) <= 1e-5


def test_exact_paths_where_last_parts_would_select_more(tmp_path: Path) -> None:
    base = build_base("bert")
    modules = [name for name, _ in base.named_modules()]
    names = match_targets(base, targets=("layer.0.attention.self.query",), saved_modules=())
    assert len(names) == 1
    inject_lora(base, names, LoraSettings(r=R, alpha=ALPHA, dropout=0.0))
    freeze_base(base, ("classifier",))
    shake(base)
    write_peft(tmp_path, adapter_of(base, names, ("classifier",), "SEQ_CLS"), module_names=modules)
    assert load_peft(tmp_path).targets == names
    assert gap(base, load_with_peft("bert", tmp_path)) <= 1e-5


def test_peft_exclusions_and_all_linear_are_read(tmp_path: Path) -> None:
    theirs = get_peft_model(
        build_base("bert"),
        LoraConfig(
            r=R,
            lora_alpha=ALPHA,
            target_modules="all-linear",
            exclude_modules=["layer.0.attention.self.query"],
            task_type="SEQ_CLS",
        ),
    ).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    assert gap(load_with_ours("bert", tmp_path), theirs) <= 1e-5


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_those_of_peft(bias: str, tmp_path: Path) -> None:
    ours = build_base("bert")
    saved = ("classifier",)
    names = match_targets(ours, targets=("query",), saved_modules=saved)
    settings = LoraSettings(r=R, alpha=ALPHA, bias=bias)
    inject_lora(ours, names, settings)
    freeze_base(ours, saved, bias=bias)
    shake(ours)
    adapter = PeftAdapter(
        settings=settings,
        targets=names,
        saved_modules=saved,
        task_type="SEQ_CLS",
        base_name=None,
        revision=None,
        state=adapter_state(ours, saved),
    )
    write_peft(tmp_path / "ours", adapter)
    config = LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules=["query"],
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
        bias=bias,
    )
    theirs = get_peft_model(build_base("bert"), config)
    theirs.save_pretrained(tmp_path / "theirs")
    shapes = [
        {
            name: (tensor.shape, tensor.dtype)
            for name, tensor in load_file(tmp_path / side / "adapter_model.safetensors").items()
            # PEFT repeats the bias of the head under the names of its own wrapper.
            if ".classifier.modules_to_save." not in name and ".original_module." not in name
        }
        for side in ("ours", "theirs")
    ]
    assert shapes[0] == shapes[1]
    assert load_peft(tmp_path / "theirs").state.keys() == load_peft(tmp_path / "ours").state.keys()
    trained = {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(trained) == len(trainable_parameters(ours))
    loaded = PeftModel.from_pretrained(build_base("bert"), tmp_path / "ours").eval()
    assert torch.allclose(loaded(**batch()).logits, ours(**batch()).logits, atol=1e-5)
    again = load_peft(tmp_path / "ours")
    assert again.settings.bias == bias
    other = build_base("bert")
    inject_lora(other, names, again.settings)
    freeze_base(other, again.saved_modules, bias=bias)
    load_adapter_state(other, again.state, again.saved_modules)
    assert torch.equal(other(**batch()).logits, ours(**batch()).logits)
