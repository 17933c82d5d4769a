"""What a run changes in the forward pass of the model that it trains."""

from torch import nn

from lora_cli.config.sections import TrainerConfig
from lora_cli.errors import Problem, UserError
from lora_cli.training.noise import add_noise, check_noise
from lora_cli.training.recompute import check_recompute, recompute_blocks


def check_forward(model: nn.Module, config: TrainerConfig) -> None:
    """Check that the model allows the changes that are asked for.

    Raises:
        UserError: If it does not; every such change is named.
    """
    problems: list[Problem] = []
    for is_wanted, check in (
        (config.neftune_alpha is not None, check_noise),
        (config.gradient_checkpointing, check_recompute),
    ):
        try:
            if is_wanted:
                check(model)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)


def change_forward(model: nn.Module, config: TrainerConfig) -> None:
    """Change a model with adapters in place, as `check_forward` has allowed."""
    if config.neftune_alpha is not None:
        add_noise(model, config.neftune_alpha)
    if config.gradient_checkpointing:
        recompute_blocks(model)
