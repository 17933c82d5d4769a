"""Devices, processes and number formats, through Accelerate; nothing else imports it."""

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from lora_cli.errors import Problem, UserError

PRECISIONS = {"float32": "no", "bf16": "bf16", "fp16": "fp16"}


def default_device() -> torch.device:
    """Return the device that a single process computes on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(model: Any) -> torch.device:
    """Return where a model computes: what is no module, such as an ONNX session, on the CPU."""
    return default_device() if isinstance(model, nn.Module) else torch.device("cpu")


def move_to(batch: Any, device: torch.device) -> Any:
    """Return the batch with every tensor in it on `device`."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move_to(value, device) for key, value in batch.items()}
    return batch


def seed_step(seed: int, *, step: int, rank: int) -> None:
    """Seed dropout as a pure function of seed, step and rank.

    A resumed run then draws what the uninterrupted one would have drawn, with no generator state
    to save.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Runtime:
    """One process of the run.

    Args:
        precision: Number format of forward and backward.

    Raises:
        UserError: If the device cannot compute in that format.
    """

    def __init__(self, *, precision: Literal["float32", "bf16", "fp16"]) -> None:
        if precision == "fp16" and default_device().type == "cpu":
            raise UserError(
                Problem(
                    id="trainer.precision",
                    message="`trainer.precision` must suit the device, but fp16 needs a GPU and "
                    "this run is on the CPU.",
                    key="trainer.precision",
                    allowed="float32, bf16",
                    fix="trainer.precision=bf16",
                )
            )
        # Accelerate keeps the number format of the process; the jobs of a sweep may differ in it.
        AcceleratorState._reset_state()
        self._accelerator = Accelerator(mixed_precision=PRECISIONS[precision])
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move the model to the device and wrap it for the processes and the number format."""
        prepared: nn.Module = self._accelerator.prepare_model(model)
        return prepared

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Wrap the optimizer, so that a loss scaler can skip a step that overflowed."""
        prepared: torch.optim.Optimizer = self._accelerator.prepare_optimizer(optimizer)
        return prepared

    def accumulating(self, model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Return a context in which gradients are only exchanged for the last micro-batch."""
        return nullcontext() if last else self._accelerator.no_sync(model)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, scaled where the number format asks for it."""
        self._accelerator.backward(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Undo the loss scale in the gradients."""
        self._accelerator.unscale_gradients(optimizer)

    def was_skipped(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the loss scaler left out the last step of a prepared optimizer."""
        return bool(getattr(optimizer, "step_was_skipped", False))

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of `values` over all processes."""
        total: torch.Tensor = self._accelerator.reduce(values, reduction="sum")
        return total
