import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli.lora.dense import DenseUpdateLayer


class OnesLayer(DenseUpdateLayer):
    """Adds the sum of the inputs to every output."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.size = nn.Parameter(torch.ones(1))

    def update(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().sum(-1, keepdim=True) * self.size

    @torch.no_grad()
    def dense_update(self) -> torch.Tensor:
        return torch.ones(3, 4) * self.size


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_subclass_says_what_the_update_is(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = (nn.Linear(4, 3) if kind == "linear" else Conv1D(3, 4)).to(dtype)
    layer = OnesLayer(base)
    x = torch.randint(-3, 3, (2, 5, 4)).to(dtype)
    assert layer(x).dtype == dtype
    expected = base(x).float() + x.float().sum(-1, keepdim=True)
    torch.testing.assert_close(layer(x).float(), expected, rtol=1e-2, atol=1e-2)
    merged = layer.merged()
    assert type(merged) is type(base)
    assert torch.equal(merged.weight, (base.weight.float() + 1).to(dtype))
    assert merged.weight.data_ptr() != base.weight.data_ptr()
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    assert layer.delta_weight().shape == base.weight.shape
    # As models ask for it before they call the layer.
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert layer.bias.shape == (3,)
    assert list(layer.own_tensors()) == ["size"]


def test_a_layer_without_bias() -> None:
    layer = OnesLayer(nn.Linear(4, 3, bias=False))
    assert layer.bias is None
    assert layer.merged().bias is None
