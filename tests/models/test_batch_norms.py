"""Batch norms that keep their statistics."""

import torch
from torch import nn

from lora_cli.models.batch_norms import keep_statistics


def test_what_a_row_becomes_does_not_depend_on_the_others() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.0)).train()
    keep_statistics(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(model(images)[:1], model(images[:1]))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert model[2].training
    model(images).sum().backward()
    assert model[1].weight.grad.abs().sum() > 0


def test_what_is_no_module_is_left_alone() -> None:
    keep_statistics(lambda: None)
