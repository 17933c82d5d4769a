"""The portable form of PiSSA and OLoRA: what PEFT loads, and what PEFT itself would write."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lora_cli.artifacts.peft_format import PeftAdapter, load_peft, peft_files
from lora_cli.lora.initial import start_adapters
from lora_cli.lora.inject import freeze_base, inject_lora, trainable_parameters
from lora_cli.lora.portable import from_portable, to_portable
from lora_cli.lora.settings import LoraSettings, scale_of
from lora_cli.lora.state import adapter_state, load_adapter_state

# peft 0.21 advises to do what these tests do.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*changes the base weights of the model:UserWarning"),
]
NAMES = ("0", "2", "4.inner")


def network() -> Any:
    torch.manual_seed(0)
    block = nn.Sequential()
    block.add_module("inner", nn.Linear(10, 9))
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), block)


def trained(settings: LoraSettings) -> Any:
    """A network whose adapters have taken some steps from their start."""
    model = network()
    inject_lora(model, NAMES, settings)
    start_adapters(model, settings)
    freeze_base(model, ())
    steps(model, list(trainable_parameters(model).values()))
    return model


def steps(model: Any, parameters: list[nn.Parameter]) -> None:
    torch.manual_seed(1)
    x, target = torch.randn(16, 8), torch.randn(16, 9)
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()


def write(folder: Path, state: dict[str, torch.Tensor], settings: LoraSettings) -> Path:
    adapter = PeftAdapter(
        settings=settings,
        targets=NAMES,
        saved_modules=(),
        task_type=None,
        base_name="base",
        revision=None,
        state=state,
    )
    folder.mkdir(parents=True)
    for name, content in peft_files(adapter).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("patterns", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_peft_and_we_load_what_the_live_model_computes(
    tmp_path: Path, init: str, patterns: bool, rslora: bool
) -> None:
    settings = LoraSettings(
        r=4,
        alpha=7.0,
        rslora=rslora,
        init=init,
        rank_pattern={"inner": 3, "0": 5} if patterns else {},
        alpha_pattern={"2": 3.0} if patterns else {},
    )
    model = trained(settings)
    x = torch.randn(6, 8)
    live = model(x)
    assert (live - network()(x)).abs().max() > 0.05
    folder = write(tmp_path / "a", *to_portable(adapter_state(model, ()), settings))

    theirs = PeftModel.from_pretrained(network(), str(folder))
    assert theirs.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(theirs(x), live, atol=1e-5, rtol=0)

    read = load_peft(folder)
    ours = network()
    inject_lora(ours, NAMES, read.settings)
    load_adapter_state(ours, read.state, ())
    torch.testing.assert_close(ours(x), live, atol=1e-5, rtol=0)
    for name in NAMES:
        assert ours.get_submodule(name).scale == pytest.approx(model.get_submodule(name).scale)
    assert scale_of(read.settings.r, read.settings.alpha, rslora=rslora) == pytest.approx(
        scale_of(4, 7.0, rslora=rslora)
    )


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_files_are_those_that_peft_converts_to(tmp_path: Path, init: str, rslora: bool) -> None:
    config = PeftConfig(
        init_lora_weights=init, r=4, lora_alpha=6.0, use_rslora=rslora, target_modules=[*NAMES]
    )
    theirs = get_peft_model(network(), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = init
    steps(theirs, [p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(
        tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    settings = LoraSettings(r=4, alpha=6.0, rslora=rslora, init=init)
    state, portable = to_portable(adapter_state(trained(settings), ()), settings)
    ours = write(tmp_path / "ours", state, portable)

    expected = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    found = load_file(ours / "adapter_model.safetensors")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)
    read, wanted = load_peft(ours).settings, load_peft(tmp_path / "theirs").settings
    assert (read.r, read.alpha, read.rslora) == (wanted.r, wanted.alpha, wanted.rslora)
    assert read.alpha == 6.0 * (math.sqrt(2) if rslora else 2)


@pytest.mark.parametrize("init", ["pissa", "olora", "kaiming"])
def test_the_live_state_comes_back_to_the_last_bit(tmp_path: Path, init: str) -> None:
    settings = LoraSettings(r=3, alpha=6.0, init=init, rank_pattern={"2": 5}, lora_bias=True)
    model = trained(settings)
    state = adapter_state(model, ())
    folder = write(tmp_path / "a", *to_portable(state, settings))
    back = from_portable(load_peft(folder).state, settings)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert all(tensor.is_contiguous() for tensor in back.values())
    assert ("0.start_A" in state) == (init != "kaiming")

    fresh = network()
    inject_lora(fresh, NAMES, settings)
    start_adapters(fresh, settings)
    load_adapter_state(fresh, back, ())
    x = torch.randn(6, 8)
    assert torch.equal(fresh(x), model(x))


def test_an_adapter_without_start_stays_as_it_is() -> None:
    settings = LoraSettings(r=3, alpha=6.0)
    state = adapter_state(trained(settings), ())
    portable, same = to_portable(state, settings)
    assert same == settings
    assert portable.keys() == state.keys()
    assert all(torch.equal(portable[name], state[name]) for name in state)


def test_half_an_adapter_cannot_become_portable() -> None:
    settings = LoraSettings(r=3, alpha=6.0, init="pissa")
    state = adapter_state(trained(settings), ())
    del state["2.start_A"]
    with pytest.raises(ValueError, match="2 has none"):
        to_portable(state, settings)
