"""Optimizers, and their state by parameter name."""

from collections.abc import Mapping

import torch
from torch import nn

from lora_cli.config.optim import AdafactorConfig, AdamWConfig, OptimizerConfig, SgdConfig
from lora_cli.errors import Problem, UserError


def build_optimizer(
    config: OptimizerConfig, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """Build the optimizer over named parameters; weight decay applies to matrices alone."""
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    match config:
        case AdamWConfig():
            return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
        case SgdConfig():
            return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
        case AdafactorConfig():
            return torch.optim.Adafactor(groups, lr=config.lr)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Return the moments as "<parameter name>/<moment name>" to a copy on the CPU.

    Keyed by name and not by position, since positions shift when a model registers its
    parameters in another order (pytorch#1489).
    """
    state = {}
    for name, parameter in parameters.items():
        for moment, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensor = torch.as_tensor(value).detach()
                state[f"{name}/{moment}"] = tensor.to("cpu", copy=True).contiguous()
    return state


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, torch.Tensor],
) -> None:
    """Put saved moments back.

    Raises:
        UserError: If a moment belongs to no parameter of this run.
    """
    unknown = sorted(key for key in state if key.rpartition("/")[0] not in parameters)
    if unknown:
        raise UserError(
            Problem(
                id="checkpoint.optimizer",
                message=f"The optimizer state must belong to the trained tensors, but "
                f'"{unknown[0]}" does not ({len(unknown)} such).',
                fix="resume with the configuration that wrote the checkpoint",
            )
        )
    for key, value in state.items():
        name, _, moment = key.rpartition("/")
        parameter = parameters[name]
        # Counters such as `step` stay on the CPU, as torch keeps them.
        device = parameter.device if value.ndim else torch.device("cpu")
        optimizer.state[parameter][moment] = value.to(device, copy=True)
