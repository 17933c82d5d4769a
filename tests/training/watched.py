"""A small network whose adapters, head and body the tests of the alarm cut off."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.errors import RunFailedError
from lora_cli.lora.inject import freeze_base, inject_lora
from lora_cli.lora.settings import LoraSettings
from lora_cli.training.watch import AdapterWatch

PLAIN = LoraSettings(r=2, alpha=4.0)


class Net(nn.Module):
    """Two adapted layers, a pooler that may be unused, a head; `route` says what runs."""

    # As models of transformers name their body: the rest is a head.
    base_model_prefix = "body"

    @property
    def base_model(self) -> nn.Module:
        return self.one

    def __init__(self, settings: LoraSettings = PLAIN, *, saved: tuple[str, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.pooler = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.route: Callable[[Net, torch.Tensor], torch.Tensor] = lambda net, x: net.two(net.one(x))
        inject_lora(self, ["one", "two"], settings)
        freeze_base(self, ("head", *saved))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.route(self, x))
        return y


def train(
    net: Net, watch: AdapterWatch, *, steps: int, without: str = "", skipped: tuple[int, ...] = ()
) -> int:
    """Run steps of the loop's kind; return after how many the watch was over."""
    chosen = [p for n, p in net.named_parameters() if p.requires_grad and n != without]
    optimizer = torch.optim.SGD(chosen, lr=0.1)
    for step in range(1, steps + 1):
        net.zero_grad()
        torch.manual_seed(step)
        net(torch.randn(5, 4)).square().sum().backward()
        watch.look()
        if step in skipped:
            continue
        optimizer.step()
        if watch.confirm(last=step == steps):
            return step
    return steps


def fault(net: Net, *, steps: int = 30, **options: Any) -> RunFailedError:
    watch = AdapterWatch(net, options.pop("saved", ("head",)), **options)
    with pytest.raises(RunFailedError) as caught:
        train(net, watch, steps=steps)
    assert all(problem.id == "train.dead-adapter" for problem in caught.value.problems)
    assert caught.value.exit_code == 1
    # Nothing of it is left in the model.
    assert not any(module._forward_hooks for module in net.modules())
    return caught.value
