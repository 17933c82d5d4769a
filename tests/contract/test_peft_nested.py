"""Adapters within adapters, through files and both ways: attention of torch, fused experts."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lora_cli.artifacts.peft_config import read_config
from lora_cli.artifacts.peft_format import PeftAdapter, load_peft, peft_files
from lora_cli.errors import UserError
from lora_cli.lora.experts import inject_experts, match_parameters, resolve_parameters
from lora_cli.lora.inject import freeze_base, inject_lora
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.state import adapter_state, load_adapter_state
from lora_cli.lora.targets import match_targets, resolve_targets

# peft 0.21 asks for what transformers 5 has renamed, and looks for patterns among layers only.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def siglip() -> Any:
    """A vision model that pools with an attention of torch."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = AutoConfig.for_model(
        "siglip_vision_model", **sizes, num_attention_heads=2, image_size=8, patch_size=4
    )
    return AutoModel.from_config(config).eval()


def mixtral() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SIZES)).eval()


def look(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    found: torch.Tensor = model(pixel_values=torch.randn(2, 3, 8, 8)).pooler_output
    return found


def read(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.tensor([[3, 9, 17], [5, 30, 8]])).logits
    return found


# Model, what it says, targets, fused weights.
CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], torch.Tensor], list[str], list[str]]] = {
    "attention": (siglip, look, ["attention"], []),
    "attention and layers": (siglip, look, ["attention", "q_proj"], []),
    "experts": (mixtral, read, [], ["experts.down_proj", "experts.gate_up_proj"]),
    "experts and layers": (mixtral, read, ["q_proj"], ["experts.down_proj"]),
}


def fill(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(tensors[name].shape, generator=generator) * 0.3
        for name in sorted(tensors)
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("is_short", [False, True])
@pytest.mark.parametrize("ranks", [{}, {"experts.down_proj": 3, "head.attention": 5}])
def test_peft_reads_what_is_written(
    case: str, ranks: dict[str, int], is_short: bool, tmp_path: Path
) -> None:
    build, run, targets, fused = CASES[case]
    model = build()
    base = copy.deepcopy(model)
    names = match_targets(model, targets=tuple(targets), saved_modules=())
    parameters = resolve_parameters(model, tuple(fused), saved_modules=())
    settings = LoraSettings(r=2, alpha=6.0, rank_pattern=ranks)
    module_names = [name for name, _ in model.named_modules()]
    inject_lora(model, names, settings)
    inject_experts(model, parameters, settings)
    freeze_base(model, ())
    load_adapter_state(model, fill(adapter_state(model, ())), ())
    adapter = PeftAdapter(
        settings=settings,
        targets=names,
        target_parameters=tuple(fused) if is_short else parameters,
        saved_modules=(),
        task_type=None,
        base_name=None,
        revision=None,
        state=adapter_state(model, ()),
    )
    write(tmp_path, peft_files(adapter, module_names=module_names))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(targets)
    twin = PeftModel.from_pretrained(base, tmp_path).eval()
    expected = run(model)
    assert (run(twin) - expected).abs().max() <= 1e-5
    assert not torch.allclose(run(build()), expected, atol=1e-3)
    # The live adapter has not been changed, and our own reading gives it back to the last bit.
    again = load_peft(tmp_path)
    assert again.state.keys() == adapter.state.keys()
    assert all(torch.equal(value, adapter.state[name]) for name, value in again.state.items())


@pytest.mark.parametrize("case", CASES)
def test_what_peft_writes_is_read(case: str, tmp_path: Path) -> None:
    build, run, targets, fused = CASES[case]
    model = build()
    config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, target_parameters=fused or None)
    twin = get_peft_model(copy.deepcopy(model), config)
    named = {name: value for name, value in twin.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for name, value in fill(named).items():
            named[name].copy_(value)
    twin.save_pretrained(tmp_path)
    adapter = load_peft(tmp_path)
    names = match_targets(model, targets=adapter.targets, saved_modules=())
    inject_lora(model, names, adapter.settings)
    inject_experts(
        model,
        match_parameters(model, adapter.target_parameters, saved_modules=()),
        adapter.settings,
    )
    freeze_base(model, ())
    load_adapter_state(model, adapter.state, ())
    assert (run(model) - run(twin.eval())).abs().max() <= 1e-5
    written = peft_files(adapter, module_names=[name for name, _ in build().named_modules()])
    again = tmp_path / "again"
    again.mkdir()
    write(again, written)
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (again, tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_attention_is_a_target_like_any_layer() -> None:
    found = resolve_targets(
        siglip(), targets=("attention",), exclude=(), auto=None, saved_modules=()
    )
    assert found.names == ("head.attention",)
    linear = resolve_targets(
        siglip(), targets="all-linear", exclude=(), auto=None, saved_modules=()
    )
    assert "head.attention" not in linear.names
    assert "head.attention.out_proj" not in linear.names


@pytest.mark.parametrize("version", ["0.18.1", "0.9.0", None])
def test_layout_of_older_versions_is_refused(version: str | None, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    config = {
        "peft_type": "LORA",
        "target_modules": [],
        "target_parameters": ["experts.down_proj"],
        "peft_version": version,
    }
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r'"peft_version" must be at least 0\.19') as info:
        read_config(path)
    assert [problem.id for problem in info.value.problems] == ["adapter.old-layout"]
    path.write_text(json.dumps({**config, "peft_version": "0.19.0"}))
    assert read_config(path)["target_parameters"] == ["experts.down_proj"]
    path.write_text(json.dumps({**config, "target_parameters": None, "target_modules": ["q"]}))
    assert read_config(path)["target_parameters"] is None
