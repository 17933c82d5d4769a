"""Putting an adapter that was read from files into its base model."""

from typing import Any

from lora_cli.artifacts.adapter import RECORD, Adapter
from lora_cli.artifacts.peft_format import PeftAdapter
from lora_cli.config.commands import TrainConfig
from lora_cli.errors import Problem, UserError
from lora_cli.lora.experts import inject_experts, match_parameters
from lora_cli.lora.inject import freeze_base, inject_lora, saved_modules
from lora_cli.lora.patterns import is_inside
from lora_cli.lora.state import load_adapter_state
from lora_cli.lora.strategies import apply_strategy
from lora_cli.lora.targets import match_targets
from lora_cli.lora.tokens import prepare_tokens, put_tokens
from lora_cli.models.base import BaseModel
from lora_cli.models.processors import tokenizer_of

# The run of two phases writes low-rank updates in the first, and every weight in the second.
_BOTH = "lora_then_full"


def attach_adapter(base: BaseModel, adapter: Adapter, config: TrainConfig, *, where: str) -> Any:
    """Put an adapter into its base model in place, strictly, and return the model.

    Args:
        base: The base model as it was loaded.
        adapter: Settings and tensors.
        config: The configuration that it was trained with.
        where: Its folder, for messages.

    Raises:
        UserError: If the tensors are not those that the configuration and the model ask for.
    """
    _check_form(adapter, config, where=where)
    model = base.model
    new = saved_modules(model, base.new_keys, ())
    if isinstance(adapter, PeftAdapter):
        saved = _inject(model, adapter, new, where=where)
    else:
        saved = apply_strategy(model, config.strategy, new, seed=config.seed).saved
    load_adapter_state(model, adapter.state, saved, where=where)
    return model


def _inject(
    model: Any, adapter: PeftAdapter, new: tuple[str, ...], *, where: str
) -> tuple[str, ...]:
    """Put low-rank updates into a model, and return the modules that were trained whole."""
    lacking = [name for name in new if not is_inside(name, adapter.saved_modules)]
    if lacking:
        raise UserError(
            Problem(
                id="adapter.no-head",
                message="The adapter must hold every module that the base model lacks, but "
                f"{', '.join(lacking)} is not in it.",
                where=where,
                fix="train again: such a module would be random",
            )
        )
    names = match_targets(
        model,
        targets=adapter.targets,
        exclude=adapter.exclude,
        saved_modules=adapter.saved_modules,
        variant=adapter.settings.variant,
        layers=adapter.layers,
        layers_pattern=adapter.layers_pattern,
    )
    parameters = match_parameters(
        model, adapter.target_parameters, saved_modules=adapter.saved_modules
    )
    inject_lora(model, names, adapter.settings)
    inject_experts(model, parameters, adapter.settings)
    put_tokens(model, adapter.tokens)
    freeze_base(model, adapter.saved_modules, bias=adapter.settings.bias)
    return adapter.saved_modules


def make_ready(
    model: Any, processor: Any, adapter: Adapter, config: TrainConfig, *, where: str
) -> None:
    """Add the tokens that an adapter was trained with to base model and tokenizer, in place.

    Raises:
        UserError: If the adapter has rows of other tokens than its record names.
    """
    tokens = prepare_tokens(
        model, tokenizer_of(processor), config.lora.trainable_tokens, seed=config.seed
    )
    if not isinstance(adapter, PeftAdapter):
        return
    trained = {name: tuple(indices) for name, indices in adapter.tokens.items()}
    if trained != tokens:
        raise UserError(
            Problem(
                id="adapter.other-tokens",
                message="The adapter must have trained the tokens of its record, but these have "
                f"the numbers {tokens}, and the adapter has rows for {trained}.",
                where=where,
                fix="use the adapter folder and the base model as they were trained",
            )
        )


def _check_form(adapter: Adapter, config: TrainConfig, *, where: str) -> None:
    """Refuse tensors of another form than the strategy writes."""
    name = config.strategy.name
    if isinstance(adapter, PeftAdapter):
        fits = name in ("lora", _BOTH)
    else:
        fits = name != "lora" and (adapter.prefix is not None) == (name == "prefix")
    if not fits:
        raise UserError(
            Problem(
                id="adapter.record",
                message=f"{RECORD} must say how the tensors were trained, but strategy={name} "
                "does not write such files.",
                where=where,
                fix="use an adapter folder as `lora-cli train` wrote it",
            )
        )
