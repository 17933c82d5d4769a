"""Devices, processes and number formats, through Accelerate; nothing else imports it."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from lora_cli.config.sections import TrainerConfig
from lora_cli.errors import Problem, UserError
from lora_cli.training.group import join_group
from lora_cli.training.sharding import Sharding, refused, shard_model, sharding_of_accelerate

# Seconds; a setting in commands, and long enough not to matter elsewhere.
TIMEOUT = 1800.0
# Variables in which `accelerate launch` says what it has set up, besides data
# parallelism and FSDP.
_OTHERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed, which keeps gradients to itself and checkpoints as"
    " pickles",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
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


def check_device(config: TrainerConfig) -> None:
    """Check that the device can compute in the number formats that are asked for.

    Raises:
        UserError: If it cannot; each of them is named.
    """
    problems = list(_unfit(precision=config.precision, tf32=config.tf32))
    if problems:
        raise UserError(problems)


def _unfit(*, precision: str, tf32: bool) -> Iterator[Problem]:
    if default_device().type != "cpu":
        return
    if precision == "fp16":
        yield Problem(
            id="trainer.precision",
            message="`trainer.precision` must suit the device, but fp16 needs a GPU and "
            "this run is on the CPU.",
            key="trainer.precision",
            allowed="float32, bf16",
            fix="trainer.precision=bf16",
        )
    if tf32:
        yield Problem(
            id="trainer.tf32",
            message="`trainer.tf32` must be false where there is no GPU, but is true.",
            key="trainer.tf32",
            fix="trainer.tf32=false",
        )


def use_tf32(wanted: bool) -> None:
    """Let float32 matrices be multiplied in TF32, or not, in this process.

    Raises:
        UserError: If it is wanted and there is no GPU.
    """
    if problems := list(_unfit(precision="float32", tf32=wanted)):
        raise UserError(problems)
    torch.set_float32_matmul_precision("high" if wanted else "highest")


class Runtime:
    """One process of the run.

    Args:
        precision: Number format of forward and backward.
        timeout: Seconds without an answer from another process after which it counts as lost.
        shard_base: Whether each process keeps a share of the frozen base alone. It does as well
            where `accelerate launch` was asked for FSDP.

    Raises:
        UserError: If the device cannot compute in that format, if `accelerate launch` was asked
            for what is not done here, or if there is only one process to share among.

    Attributes:
        group: The processes of the run.
        device: Where this process computes.
        sharding: How the base is spread over the processes; None where each holds all of it.
    """

    def __init__(
        self,
        *,
        precision: Literal["float32", "bf16", "fp16"],
        timeout: float = TIMEOUT,
        shard_base: bool = False,
    ) -> None:
        if problems := list(_unfit(precision=precision, tf32=False)):
            raise UserError(problems)
        _refuse_others()
        self.sharding = sharding_of_accelerate() or (Sharding() if shard_base else None)
        self.group = join_group(timeout)
        if self.sharding is not None and self.group.size == 1:
            raise refused("be false in a run of one process", fix="distributed.num_processes=2")
        # Accelerate keeps the number format of the process; the jobs of a sweep may differ in it.
        AcceleratorState._reset_state()
        self._accelerator = Accelerator(
            mixed_precision=PRECISIONS[precision],
            # Without it Accelerate takes several processes without GPUs for so many runs of one.
            cpu=self.group.size > 1 and default_device().type == "cpu",
        )
        self.device: torch.device = self._accelerator.device

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move the model to the device and make it compute in the number format.

        It is not wrapped for the processes: the loop adds up the gradients, see `add_gradients`.
        Where the base is spread over them, the model keeps its share alone.
        """
        if self.sharding is not None:
            shard_model(model, self.sharding, group=self.group, device=self.device)
        prepared: nn.Module = self._accelerator.prepare_model(model, evaluation_mode=True)
        return prepared

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Wrap the optimizer, so that a loss scaler can skip a step that overflowed."""
        prepared: torch.optim.Optimizer = self._accelerator.prepare_optimizer(optimizer)
        return prepared

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, scaled where the number format asks for it."""
        self._accelerator.backward(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Undo the loss scale in the gradients."""
        self._accelerator.unscale_gradients(optimizer)

    def loss_scale(self) -> tuple[float, int] | None:
        """Return what the loss is multiplied by and since how many steps, None without a scaler."""
        scaler = self._accelerator.scaler
        if scaler is None:
            return None
        state = scaler.state_dict()
        return float(state["scale"]), int(state["_growth_tracker"])

    def set_loss_scale(self, scale: float | None, steps: int) -> None:
        """Go on with a `loss_scale`; without a scaler there is nothing to do."""
        scaler = self._accelerator.scaler
        if scaler is not None and scale is not None:
            scaler.load_state_dict(
                {**scaler.state_dict(), "scale": scale, "_growth_tracker": steps}
            )

    def was_skipped(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the loss scaler left out the last step of a prepared optimizer."""
        return bool(getattr(optimizer, "step_was_skipped", False))


def _refuse_others() -> None:
    """Refuse to be started for a way of working together that this runtime would ignore.

    Raises:
        UserError: If `accelerate launch` was given such a configuration.
    """
    found = [name for name in _OTHERS if os.environ.get(name, "").lower() == "true"]
    if found:
        raise UserError(
            Problem(
                id="distributed.unsupported",
                message="The processes must each compute whole layers with an optimizer of their"
                f" own, but the configuration of accelerate asks for {_OTHERS[found[0]]}.",
                fix="distributed.shard_base=true, or accelerate launch --use_fsdp --fsdp_version 2,"
                " spreads the frozen base as ZeRO-3 does; of adapters there is little to spread",
            )
        )
