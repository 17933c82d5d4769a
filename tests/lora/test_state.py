import pytest
import torch
from torch import nn

from lora_cli.errors import UserError
from lora_cli.lora.inject import freeze_base, inject_lora
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.state import adapter_state, load_adapter_state


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def build(seed: int = 0) -> Net:
    torch.manual_seed(0)
    model = Net()
    torch.manual_seed(seed)
    inject_lora(model, ["body"], LoraSettings(r=2, alpha=2.0, dropout=0.0))
    freeze_base(model, ("head",))
    return model


def trained() -> Net:
    model = build(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model(torch.randn(8, 4))  # moves the running statistics
    return model


def test_state_restores_the_same_function() -> None:
    model, other = trained().eval(), build(2).eval()
    state = adapter_state(model, ("head",))
    x = torch.randn(3, 4)
    assert not torch.equal(model(x), other(x))
    load_adapter_state(other, state, ("head",))
    assert torch.equal(model(x), other(x))
    assert set(state) == {
        "body.lora_A.weight",
        "body.lora_B.weight",
        *(f"head.{name}" for name in model.head.state_dict()),
    }


def test_state_is_a_copy() -> None:
    model = trained()
    state = adapter_state(model, ("head",))
    before = state["body.lora_B.weight"].clone()
    with torch.no_grad():
        model.body.lora_B.weight.add_(1)
    assert torch.equal(state["body.lora_B.weight"], before)
    for tensor in state.values():
        assert tensor.is_contiguous()
        assert not tensor.requires_grad


def test_each_lost_renamed_reshaped_or_broken_tensor_is_an_error() -> None:
    state = adapter_state(trained(), ("head",))
    for name, tensor in state.items():
        lost = {k: v for k, v in state.items() if k != name}
        renamed = {**lost, f"{name}x": tensor}
        reshaped = {**lost, name: torch.zeros(*tensor.shape, 2)}
        broken = {**lost, name: torch.full(tensor.shape, float("nan"))}
        for damaged in (lost, renamed, reshaped, broken):
            model = build(2)
            before = adapter_state(model, ("head",))
            with pytest.raises(UserError) as caught:
                load_adapter_state(model, damaged, ("head",), where="runs/a/adapter")
            assert name in str(caught.value)
            assert {p.id for p in caught.value.problems} == {"adapter.state"}
            assert {p.where for p in caught.value.problems} == {"runs/a/adapter"}
            after = adapter_state(model, ("head",))
            assert all(torch.equal(after[k], before[k]) for k in before)


def test_all_faults_are_listed_together() -> None:
    state = adapter_state(trained(), ("head",))
    del state["head.1.bias"]
    state["stray"] = torch.zeros(1)
    state["body.lora_A.weight"] = torch.zeros(3, 4)
    state["body.lora_B.weight"][0, 0] = float("inf")
    with pytest.raises(UserError) as caught:
        load_adapter_state(build(), state, ("head",))
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    for part in ("head.1.bias", "stray", "(3, 4) instead of (2, 4)", "body.lora_B.weight"):
        assert part in text


def test_half_precision_state_is_widened() -> None:
    state = adapter_state(trained(), ("head",))
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    model = build()
    load_adapter_state(model, half, ("head",))
    assert model.body.lora_A.weight.dtype == torch.float32
    assert torch.equal(model.body.lora_A.weight, half["body.lora_A.weight"].float())
