"""What a training method may do at each optimizer step besides descending the gradient."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from lora_cli.lora.adalora import AdaLoraLinear, RankAllocator
from lora_cli.lora.settings import LoraSettings


class StepMethod(Protocol):
    """Acts on the adapters of one model while they are trained.

    The loop adds the gradient of `penalty` once to that of the mean loss, whatever the number of
    micro-batches and processes, and keeps `state` in checkpoints, from which a resumed run goes on
    bit-equal. Everything is computed from gradients that all processes share.
    """

    def penalty(self) -> torch.Tensor | None:
        """Return what is added to the mean loss of the step, or None for nothing."""

    def after_step(self, step: int) -> None:
        """Act after optimizer step `step`, counted from 1, while its gradients still exist.

        A step that a loss scaler skipped is left out.
        """

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies on the CPU of all that `after_step` will need besides the adapters."""

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from a `state`.

        Raises:
            UserError: If it belongs to other adapters.
        """


def build_method(model: nn.Module, settings: LoraSettings) -> StepMethod | None:
    """Return what the variant of a model's adapters does at each step, or None for nothing.

    Once they are merged, there are none.
    """
    has_layers = any(isinstance(module, AdaLoraLinear) for module in model.modules())
    if settings.adalora is None or not has_layers:
        return None
    return RankAllocator(model, r=settings.r, settings=settings.adalora)
