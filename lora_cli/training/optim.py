"""Optimizers, and their state by parameter name."""

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from lora_cli.config.optim import (
    AdafactorConfig,
    AdamW8BitConfig,
    AdamWConfig,
    LionConfig,
    OptimizerConfig,
    ScheduleFreeConfig,
    SgdConfig,
)
from lora_cli.errors import Problem, UserError

# Parts of the names of A and B.
_A = frozenset({"lora_A", "lora_embedding_A"})
_B = frozenset({"lora_B", "lora_embedding_B"})
# Of a parameter group: what the learning rate of the run is multiplied by.
_RATIO = "lr_ratio"
# Before the name of a number that an optimizer keeps for a group of parameters.
_GROUP = "group."
# Numbers of a group that change while training: those of schedule-free AdamW.
_GROUP_NUMBERS = ("k", "weight_sum", "lr_max")
# The package of an optimizer that torch does not have, and the extra that installs it.
_PACKAGES: dict[str, tuple[str, str]] = {
    "lion": ("lion_pytorch", "optimizers"),
    "schedule_free": ("schedulefree", "optimizers"),
    "adamw_8bit": ("bitsandbytes", "quantization"),
}


def check_optimizer(name: str) -> None:
    """Check that the package is there which an optimizer needs.

    Raises:
        UserError: If it is not.
    """
    package, extra = _PACKAGES.get(name, ("", ""))
    if not package or find_spec(package) is not None:
        return
    raise UserError(
        Problem(
            id="optimizer.missing-extra",
            message=f"`optimizer` must be one that is installed, but {name} needs {package}.",
            key="optimizer",
            fix=f'pip install "lora-cli[{extra}]"',
        )
    )


def build_optimizer(
    config: OptimizerConfig, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """Build the optimizer over named parameters.

    Weight decay applies to matrices alone. With `lora_plus_ratio` the learning rate of every B is
    that many times the usual one (Hayou et al. 2024, "LoRA+", arXiv:2402.12354); PEFT and the
    authors' code give it to every vector too, which the paper does not ask for. Adafactor never
    goes above ``1 / sqrt(step)``.

    Raises:
        UserError: If a package is missing.
    """
    check_optimizer(config.name)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        parts = name.split(".")
        ratio = 1.0 if _B.isdisjoint(parts) else config.lora_plus_ratio
        decay = 0.0 if parameter.ndim < 2 else _weight_decay(config, parts)
        groups.setdefault((ratio, decay), []).append(parameter)
    described: list[dict[str, Any]] = [
        {"params": members, "weight_decay": decay, "lr": config.lr * ratio, _RATIO: ratio}
        for (ratio, decay), members in sorted(groups.items(), key=lambda item: item[0])
    ]
    match config:
        case AdamWConfig():
            return torch.optim.AdamW(described, lr=config.lr, betas=config.betas, eps=config.eps)
        case SgdConfig():
            return torch.optim.SGD(described, lr=config.lr, momentum=config.momentum)
        case AdafactorConfig():
            return torch.optim.Adafactor(described, lr=config.lr)
        case _:
            return _build_from_package(config, described)


def _weight_decay(config: OptimizerConfig, parts: list[str]) -> float:
    own = None
    if not _A.isdisjoint(parts):
        own = config.weight_decay_a
    elif not _B.isdisjoint(parts):
        own = config.weight_decay_b
    return config.weight_decay if own is None else own


def _build_from_package(
    config: LionConfig | ScheduleFreeConfig | AdamW8BitConfig, groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    optimizer: Any
    match config:
        case LionConfig():
            from lion_pytorch import Lion

            optimizer = Lion(groups, lr=config.lr, betas=config.betas)
        case ScheduleFreeConfig():
            from schedulefree import AdamWScheduleFree

            optimizer = AdamWScheduleFree(groups, lr=config.lr, betas=config.betas, eps=config.eps)
            optimizer.train()
        case AdamW8BitConfig():
            # It warns on import about a faster kernel to be had from the hub.
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
            from bitsandbytes.optim.adamw import AdamW8bit

            optimizer = AdamW8bit(
                groups,
                lr=config.lr,
                betas=config.betas,
                eps=config.eps,
                min_8bit_size=config.min_size,
            )
    built: torch.optim.Optimizer = optimizer
    return built


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group: `lr`, times LoRA+'s ratio for those of B."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[_RATIO]


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Return the moments as "<parameter name>/<moment name>" to a copy on the CPU.

    Keyed by name and not by position, since positions shift when a model registers its
    parameters in another order (pytorch#1489). What an optimizer keeps for a group of parameters
    stands with each of them. Plain numbers become float64 or int64 without dimensions.
    """
    shared: dict[nn.Parameter, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        numbers = {f"{_GROUP}{key}": group[key] for key in _GROUP_NUMBERS if key in group}
        shared |= dict.fromkeys(group["params"], numbers)
    state = {}
    for name, parameter in parameters.items():
        moments = {**optimizer.state.get(parameter, {}), **shared.get(parameter, {})}
        for moment, value in moments.items():
            if value is not None:
                state[f"{name}/{moment}"] = _as_tensor(value)
    return state


def _as_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


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
    group_of = {
        parameter: group for group in optimizer.param_groups for parameter in group["params"]
    }
    for key, value in state.items():
        name, _, moment = key.rpartition("/")
        parameter = parameters[name]
        if moment.startswith(_GROUP):
            group_of[parameter][moment.removeprefix(_GROUP)] = value.item()
        else:
            optimizer.state[parameter][moment] = _as_moment(value, parameter.device)


def _as_moment(value: torch.Tensor, device: torch.device) -> Any:
    if value.ndim == 0 and value.dtype in (torch.float64, torch.int64):
        return value.item()
    # Counters such as `step` stay on the CPU, as torch keeps them.
    return value.to(device if value.ndim else torch.device("cpu"), copy=True)
