"""What is trained: one function for each strategy other than low-rank updates.

Each takes a freshly loaded model, puts in what the strategy adds, and decides what of it is
trained. What is trained is float32, whatever the base is; `round_to` brings it back.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_cli.config.strategies import (
    AdapterStrategyConfig,
    PrefixStrategyConfig,
    StrategyConfig,
    TopStrategyConfig,
)
from lora_cli.errors import Problem, UserError
from lora_cli.lora.blocks import describe_blocks, stack_depths
from lora_cli.lora.bottleneck import BottleneckLayer, put_bottlenecks
from lora_cli.lora.inject import freeze_base
from lora_cli.lora.kinds import is_quantized
from lora_cli.lora.patterns import is_inside
from lora_cli.lora.prefix import Prefix, PrefixSize, put_prefix
from lora_cli.models.heads import head_names, output_embeddings

# Strategies that put low-rank updates into the model first.
WITH_LORA = ("lora", "lora_then_full")

# Why what a strategy adds to the model cannot become part of its weights.
_UNMERGEABLE = {
    "adapter": "a bottleneck adapter has a nonlinearity between its two layers",
    "prefix": "a prefix adds keys and values to the attention",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """What a strategy has made of a model.

    Attributes:
        saved: Modules that are trained and saved whole, besides single parameters.
        text: What is trained, for people.
        prefix: How large the prefix is, if there is one.
    """

    saved: tuple[str, ...]
    text: str
    prefix: PrefixSize | None = None


def apply_strategy(
    model: nn.Module, strategy: StrategyConfig, new: tuple[str, ...], *, seed: int
) -> Applied:
    """Prepare a base model for training by any strategy that has no low-rank updates, in place.

    Args:
        model: The base model, as it was loaded.
        strategy: Which, and its settings.
        new: Modules that the base weights did not provide; see `saved_modules`.
        seed: Decides the start of what is added; the caller's random state is kept.

    Raises:
        UserError: If the strategy does not suit the model, which is then unchanged.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _TABLE[strategy.name](model, strategy, head_modules(model, new), seed)


def head_modules(model: nn.Module, new: tuple[str, ...]) -> tuple[str, ...]:
    """Return the head: what is new, and what else stands beside the body of the model.

    The output embedding of a language model is no head.
    """
    outputs = output_embeddings(model)
    beside = {
        name
        for name in head_names(model)
        if next(model.get_submodule(name).parameters(), None) is not None
        and not is_inside(name, (*new, *outputs))
        and not any(is_inside(other, (name,)) for other in (*new, *outputs))
    }
    outermost = [name for name in beside if not is_inside(name, beside - {name})]
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return tuple(sorted((*new, *outermost), key=order.__getitem__))


def own_frozen(model: nn.Module) -> frozenset[str]:
    """Return the parameters that a model never trains, such as tables of sines.

    To be called before anything is frozen.
    """
    return frozenset(name for name, value in model.named_parameters() if not value.requires_grad)


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the number formats of a model as it was loaded, for `round_to`."""
    return {name: tensor.dtype for name, tensor in _named_tensors(model).items()}


def train_all(model: nn.Module, frozen: Collection[str] = ()) -> None:
    """Make every weight float32 and trained, in place, but for those named in `frozen`."""
    widen(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def check_mergeable(strategy: str, *, key: str, fix: str) -> None:
    """Refuse to merge what cannot become part of the weights.

    Args:
        strategy: Its name.
        key: Setting that asked for it.
        fix: What to do instead.

    Raises:
        UserError: If it cannot.
    """
    if why := why_unmergeable(strategy):
        raise UserError(
            Problem(
                id="merge.impossible",
                message=f"`{key}` must be something that can be merged into the base weights, "
                f"but {why}, so strategy={strategy} cannot.",
                key=key,
                fix=fix,
            )
        )


def why_unmergeable(strategy: str) -> str | None:
    """Return why what a strategy trains cannot be merged, or None where it can."""
    return _UNMERGEABLE.get(strategy)


@torch.no_grad()
def round_to(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Round trained weights once to the number formats of the base, in place: the merged model.

    A module that a coarser model is trained in parts of computes in float32 still, with the rounded
    values: its neighbours hand it what suits that.
    """
    whole = all(
        tensor.dtype == torch.float32
        for tensor in _named_tensors(model).values()
        if tensor.is_floating_point()
    )
    for name, tensor in _named_tensors(model).items():
        wanted = dtypes.get(name, tensor.dtype)
        if wanted != tensor.dtype:
            tensor.data = tensor.to(wanted) if whole else tensor.to(wanted).to(tensor.dtype)


def _named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def widen(model: nn.Module) -> None:
    """Make every floating tensor below float32 float32, in place."""
    for tensor in _named_tensors(model).values():
        if tensor.is_floating_point() and tensor.dtype.itemsize < torch.float32.itemsize:
            tensor.data = tensor.data.float()


def check_plain(model: nn.Module, strategy: StrategyConfig) -> None:
    """Refuse to train weights of the base that are quantized.

    Raises:
        UserError: If there are some.
    """
    if any(is_quantized(module) for module in model.modules()):
        raise UserError(
            Problem(
                id="strategy.quantized",
                message=f"`model.quantization` must be none with strategy={strategy.name}, which "
                "trains weights of the base, but they are quantized.",
                key="model.quantization",
                fix="model.quantization=none, or strategy=lora",
            )
        )


def _full(model: nn.Module, strategy: StrategyConfig, head: tuple[str, ...], _: int) -> Applied:
    check_plain(model, strategy)
    train_all(model, own_frozen(model))
    return Applied(saved=head, text="every weight")


def _head(model: nn.Module, _: StrategyConfig, head: tuple[str, ...], _seed: int) -> Applied:
    if not head:
        raise UserError(
            Problem(
                id="strategy.no-head",
                message="`strategy=head` must have a head to train, but the model has none.",
                key="strategy",
                fix="strategy=top, strategy=lora",
            )
        )
    freeze_base(model, head)
    return Applied(saved=head, text="nothing but the head")


def _top(model: nn.Module, strategy: TopStrategyConfig, head: tuple[str, ...], _: int) -> Applied:
    count = strategy.layers
    check_plain(model, strategy)
    depths = stack_depths(name for name, _ in model.named_modules() if not is_inside(name, head))
    # Of an encoder and a decoder, the latter gives the output.
    stack, depth = list(depths.items())[-1] if depths else ("", 0)
    if count > depth:
        raise UserError(
            Problem(
                id="strategy.layers",
                message=f"`strategy.layers` must be at most {depth}, the blocks that the model "
                f"has, but is {count}.",
                key="strategy.layers",
                allowed=f"1 to {depth}" if depth else None,
                fix="strategy=full trains all of them" if depth else "strategy=full",
            )
        )
    blocks = tuple(f"{stack}.{index}" for index in range(depth - count, depth))
    saved = (*blocks, *head)
    freeze_base(model, saved)
    shown = describe_blocks(f"{name}.x" for name in blocks)
    return Applied(saved=saved, text=f"blocks {shown} of {stack}, and the head")


def _bitfit(model: nn.Module, strategy: StrategyConfig, head: tuple[str, ...], _: int) -> Applied:
    check_plain(model, strategy)
    biases = {
        name: parameter
        for name, parameter in model.named_parameters()
        if is_bias(name, parameter) and not is_inside(name, head)
    }
    if not biases:
        family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise UserError(
            Problem(
                id="strategy.no-biases",
                message="`strategy=bitfit` must have biases to train, but the layers of "
                f"{family} have none.",
                key="strategy",
                fix="strategy=lora",
            )
        )
    widen(model)
    freeze_base(model, head)
    for parameter in biases.values():
        parameter.requires_grad_(True)
    return Applied(saved=head, text=f"{len(biases)} biases and the head")


def is_bias(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the constant term of a layer."""
    last = name.rpartition(".")[2]
    return parameter.ndim == 1 and (last == "bias" or last.endswith("_bias"))


def _adapter(
    model: nn.Module, strategy: AdapterStrategyConfig, head: tuple[str, ...], _: int
) -> Applied:
    names = put_bottlenecks(model, size=strategy.size, placement=strategy.placement)
    freeze_base(model, head)
    for module in model.modules():
        if isinstance(module, BottleneckLayer):
            module.down.requires_grad_(True)
            module.up.requires_grad_(True)
    text = f"bottlenecks of width {strategy.size} behind {len(names)} layers, and the head"
    return Applied(saved=head, text=text)


def _prefix(
    model: nn.Module, strategy: PrefixStrategyConfig, head: tuple[str, ...], seed: int
) -> Applied:
    size = put_prefix(model, num_tokens=strategy.num_tokens, seed=seed)
    freeze_base(model, head)
    for module in model.modules():
        if isinstance(module, Prefix):
            module.requires_grad_(True)
    text = f"a prefix of {size.num_tokens} tokens in {size.num_layers} layers, and the head"
    return Applied(saved=head, text=text, prefix=size)


_TABLE: dict[str, Callable[[Any, Any, tuple[str, ...], int], Applied]] = {
    "adapter": _adapter,
    "bitfit": _bitfit,
    "full": _full,
    "head": _head,
    "lora_then_full": _full,
    "prefix": _prefix,
    "top": _top,
}
