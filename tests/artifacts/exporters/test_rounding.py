"""Random moves as large as a number format allows, against the formats themselves."""

import gguf
import pytest
import torch
from torch import nn

from lora_cli.artifacts.exporters.rounding import (
    moved_inputs,
    moved_weights,
    steps_of_blocks,
    steps_of_floats,
    steps_of_integers,
)


@pytest.fixture
def weight() -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(64, 96, generator=draw) * torch.randn(64, 1, generator=draw).exp()


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 10), (torch.bfloat16, 7)])
def test_floats_round_by_at_most_half_a_step(
    weight: torch.Tensor, dtype: torch.dtype, bits: int
) -> None:
    ratio = (weight.to(dtype).float() - weight).abs() / steps_of_floats(bits)(nn.Module(), weight)
    assert 0.49 < ratio.max() <= 0.5


def test_blocks_round_by_at_most_half_a_step(weight: torch.Tensor) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    stored = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
    moved = (torch.from_numpy(stored) - weight).abs()
    ratio = moved / steps_of_blocks(nn.Module(), weight)
    assert 0.4 < ratio.max() <= 0.5


def test_integers_have_a_step_for_each_row_of_a_linear_layer(weight: torch.Tensor) -> None:
    steps = steps_of_integers(64)
    linear, table = nn.Linear(1, 1), nn.Embedding(1, 1)
    assert torch.equal(steps(linear, weight), weight.abs().amax(1, keepdim=True) / 64)
    assert torch.equal(steps(table, weight), weight.abs().max() / 64)


def test_weights_move_within_half_a_step_and_come_back(weight: torch.Tensor) -> None:
    model = nn.Sequential(nn.Embedding(64, 96), nn.Linear(96, 64))
    with torch.no_grad():
        model[0].weight.copy_(weight)
        model[1].weight.copy_(weight)
    model[1].weight = model[0].weight  # tied: moved once
    bias = model[1].bias.clone()
    steps = steps_of_blocks(nn.Module(), weight)
    with moved_weights(model, steps_of_blocks, torch.Generator().manual_seed(0)):
        ratio = (model[0].weight.detach() - weight).abs() / steps
        assert 0.45 < ratio.max() <= 0.51
        assert torch.equal(model[1].bias, bias)
    assert torch.equal(model[0].weight, weight)


def test_inputs_move_by_their_range() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
    given = torch.rand(32, 8) + 1  # the range includes zero, so it is 2 wide
    with moved_inputs(model, torch.Generator().manual_seed(0)):
        moved = (model(given) - given).abs().max()
    assert 0.9 < moved / (0.5 * given.max() / 255) <= 1.01
    assert torch.equal(model(given), given)
