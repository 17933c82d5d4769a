"""Optimizers, and their state by parameter name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_cli.config.optim import AdafactorConfig, AdamWConfig, OptimizerConfig, SgdConfig
from lora_cli.errors import Problem, UserError

# Parts of the names of B.
_B = frozenset({"lora_B", "lora_embedding_B"})
# Of a parameter group: what the learning rate of the run is multiplied by.
_RATIO = "lr_ratio"


def build_optimizer(
    config: OptimizerConfig, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """Build the optimizer over named parameters.

    Weight decay applies to matrices alone. With `lora_plus_ratio` the learning rate of every B is
    that many times the usual one (Hayou et al. 2024, "LoRA+", arXiv:2402.12354); PEFT and the
    authors' code give it to every vector too, which the paper does not ask for. Adafactor never
    goes above ``1 / sqrt(step)``.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        is_b = config.lora_plus_ratio != 1.0 and not _B.isdisjoint(name.split("."))
        groups.setdefault((is_b, parameter.ndim < 2), []).append(parameter)
    ratios = {False: 1.0, True: config.lora_plus_ratio}
    described: list[dict[str, Any]] = [
        {
            "params": groups[is_b, is_vector],
            "weight_decay": 0.0 if is_vector else config.weight_decay,
            "lr": config.lr * ratios[is_b],
            _RATIO: ratios[is_b],
        }
        for is_b, is_vector in sorted(groups)
    ]
    match config:
        case AdamWConfig():
            return torch.optim.AdamW(described, lr=config.lr, betas=config.betas, eps=config.eps)
        case SgdConfig():
            return torch.optim.SGD(described, lr=config.lr, momentum=config.momentum)
        case AdafactorConfig():
            return torch.optim.Adafactor(described, lr=config.lr)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group: `lr`, times LoRA+'s ratio for those of B."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[_RATIO]


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
