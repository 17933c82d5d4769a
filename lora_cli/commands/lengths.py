"""Whether a model has positions for rows as long as they may be."""

from collections.abc import Iterator
from typing import Any

from lora_cli.config.commands import TrainConfig
from lora_cli.config.strategies import PrefixStrategyConfig
from lora_cli.errors import Problem, UserError
from lora_cli.models.architecture import token_positions


def check_length(config: TrainConfig, model: Any) -> None:
    """Refuse rows longer than the model has positions for, after those of a prefix.

    Raises:
        UserError: If they may be longer.
    """
    if problems := list(_problems(config, model)):
        raise UserError(problems)


def _problems(config: TrainConfig, model: Any) -> Iterator[Problem]:
    strategy = config.strategy
    prefix = strategy.num_tokens if isinstance(strategy, PrefixStrategyConfig) else 0
    for name, is_decoder in (("max_length", False), ("max_target_length", True)):
        wanted, positions = getattr(config.task, name, 0), _positions(model.config, is_decoder)
        if positions is None or wanted + prefix <= positions:
            continue
        left = positions - prefix
        which = "the positions that the model has"
        if prefix:
            which = f"the {positions} positions of the model less the prefix"
        yield Problem(
            id="task.max-length",
            message=f"`task.{name}` must be at most {left}, {which}, but is {wanted}.",
            key=f"task.{name}",
            allowed=f"4 to {left}",
            fix=f"task.{name}={left}",
        )


def _positions(config: Any, is_decoder: bool) -> int | None:
    """Return the tokens that a model, or its decoder, can look at; None where any number."""
    own = getattr(config, "decoder" if is_decoder else "encoder", config)
    # One half of a dual encoder reads texts.
    return token_positions(getattr(own, "text_config", own))
