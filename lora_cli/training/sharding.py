"""The frozen base spread over the processes, each of which keeps a share of every weight (FSDP2).

Only what is frozen is spread. What is trained stays whole in every process, so that gradients,
optimizers, averages and checkpoints are what they are without it, bit for bit. A block of the model
is put together when it runs, forward and backward, and let go of again. For that all processes must
run the same passes: one without rows of its own runs along, and one that fails tells the others
before the next block.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn

from lora_cli.errors import Problem, UserError
from lora_cli.lora.blocks import block_of
from lora_cli.lora.kinds import is_quantized
from lora_cli.lora.layer import AdapterLayer
from lora_cli.training.group import Group

Item = TypeVar("Item")

KEY = "distributed.shard_base"
# What `accelerate launch --use_fsdp` may say besides its defaults, and the only values that are
# done here. Others of its settings are about the checkpoints and the loading of FSDP 1.
_DONE = {
    "VERSION": ("2", "--fsdp_version 2"),
    "OFFLOAD_PARAMS": ("false", "model.dtype=bfloat16 makes the base smaller"),
    "ACTIVATION_CHECKPOINTING": ("false", "trainer.gradient_checkpointing=true does that"),
    "AUTO_WRAP_POLICY": ("TRANSFORMER_BASED_WRAP", "leave it out: each block is a unit"),
    "IGNORED_MODULES": ("", "leave it out: all that is frozen is spread"),
    "FORWARD_PREFETCH": ("false", "leave it out"),
    "BACKWARD_PREFETCH": ("BACKWARD_PRE", "leave it out"),
}
_DROPPING = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """How the base is spread.

    Attributes:
        reshard: Let go of a block after its forward pass, and gather it again for the backward
            pass.
        blocks: Names of the classes that are put together as one; empty for the numbered blocks.
    """

    reshard: bool = True
    blocks: tuple[str, ...] = ()


@cache
def sharding_of_accelerate() -> Sharding | None:
    """Return what `accelerate launch` was asked for in its environment, None for no sharding.

    It is taken out of the environment, since transformers would load weights by it in one process
    only, and Accelerate would wrap the model.

    Raises:
        UserError: If it asks for something that is not done here.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return None
    found = {
        name.removeprefix("FSDP_"): value
        for name, value in os.environ.items()
        if name.startswith("FSDP_")
    }
    # Accelerate takes version 1 where nothing is said.
    found.setdefault("VERSION", "1")
    problems = [
        Problem(
            id="distributed.unsupported",
            message=f"`--fsdp_{name.lower()}` of accelerate must be {only or 'left out'} here, but"
            f" is {found[name]}.",
            fix=fix,
        )
        for name, (only, fix) in _DONE.items()
        if name in found and found[name].lower() != only.lower()
    ]
    if problems:
        raise UserError(problems)
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    names = found.get("TRANSFORMER_CLS_TO_WRAP", "").split(",")
    return Sharding(
        reshard=found.get("RESHARD_AFTER_FORWARD", "true").lower() == "true",
        blocks=tuple(filter(None, (name.strip() for name in names))),
    )


def check_shardable(model: nn.Module, sharding: Sharding) -> None:
    """Check that the base of a model with adapters can be spread.

    Raises:
        UserError: If it cannot.
    """
    config = getattr(model, "config", None)
    dropped = [name for name in _DROPPING if getattr(config, name, 0)]
    if dropped:
        raise refused(
            f"be false for a model that leaves out blocks at random ({dropped[0]} of its"
            " config.json), since the processes would not run the same ones",
            fix=f"{KEY}=false",
        )
    if any(is_quantized(module) for module in model.modules()):
        raise refused("be false for a base that is quantized", fix="model.quantization=none")
    if not _shares(model, _units(model, sharding)):
        raise refused(
            "be false where every weight of the base is trained, since only frozen ones are spread",
            fix="strategy=lora",
        )
    classes = {type(module).__name__ for module in model.modules()}
    unknown = [name for name in sharding.blocks if name not in classes]
    if unknown:
        raise UserError(
            Problem(
                id="distributed.unsupported",
                message="`--fsdp_transformer_cls_to_wrap` of accelerate must name classes of the"
                f" model, but {', '.join(unknown)} is none.",
                fix="leave it out: each block is a unit",
            )
        )


def spreadable_bytes(model: nn.Module, sharding: Sharding) -> int:
    """Return the size of the frozen weights of a model with adapters that can be spread."""
    shares = _shares(model, _units(model, sharding))
    return sum(parameter.numel() * parameter.element_size() for parameter in shares)


def shard_model(
    model: nn.Module, sharding: Sharding, *, group: Group, device: torch.device
) -> None:
    """Keep a share of each frozen weight alone, in place.

    Args:
        model: With adapters in place, and with what is trained marked as such.
        sharding: How.
        group: The processes, of which there are several.
        device: Where this one computes; the shares are put there.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    units = _units(model, sharding)
    shares = _shares(model, units)
    whole = {parameter for parameter in model.parameters() if parameter not in shares}
    mesh = init_device_mesh(device.type, (group.size,))
    # From within, as `fully_shard` wants it: what is left belongs to the model itself.
    for unit in reversed(units):
        if unit is model or any(shares.get(parameter) is unit for parameter in unit.parameters()):
            fully_shard(
                unit, mesh=mesh, reshard_after_forward=sharding.reshard, ignored_params=whole
            )
            _keep_in_step(unit, group)
            # Otherwise an evaluation might make tensors here that no backward pass can use.
            sharded: Any = unit
            sharded.unshard()
            sharded.reshard()
    if hasattr(model, "generate"):
        _gather_to_generate(model, group)


def is_sharded(model: Any) -> bool:
    """Whether `shard_model` has spread the base of a model, or this block of it."""
    return hasattr(model, "set_reshard_after_forward")


def shared_passes(
    model: Any, window: Sequence[Item], size: int, *, group: Group
) -> Iterator[Sequence[Item]]:
    """Yield rows for the passes that other processes make in an optimizer step and this one not.

    Args:
        model: Nothing is yielded where each process holds all of it.
        window: The rows of the step, of all processes.
        size: Rows of a micro-batch.
        group: The processes, each of which has made the passes over its own rows.
    """
    if is_sharded(model):
        own, most = (-(-len(window[rank :: group.size]) // size) for rank in (group.rank, 0))
        for _ in range(most - own):
            yield window[:1]


@contextmanager
def without_trace(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let backward passes leave the gradients as they are: those for the sake of others."""
    kept = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def local_share(parameter: Any) -> torch.Tensor:
    """Return what this process keeps of a parameter, which is all of it where it is not spread."""
    is_spread = hasattr(parameter, "device_mesh")
    share: torch.Tensor = parameter.to_local() if is_spread else parameter.detach()
    return share


def _units(model: nn.Module, sharding: Sharding) -> list[nn.Module]:
    """Return what is put together as one: the model itself first, then its blocks."""
    numbered = {
        f"{block.stack}.{block.index}"
        for block in (block_of(name) for name, _ in model.named_modules())
        if block is not None
    }
    blocks = [
        module
        for name, module in model.named_modules()
        if not isinstance(module, nn.ModuleList | nn.ModuleDict)
        and (type(module).__name__ in sharding.blocks if sharding.blocks else name in numbered)
    ]
    return [model, *(block for block in blocks if block is not model)]


def _shares(model: nn.Module, units: Iterable[nn.Module]) -> dict[nn.Parameter, nn.Module]:
    """Return the frozen weights of the base that can be spread, with the unit of each."""
    adapters = {
        tensor
        for module in model.modules()
        if isinstance(module, AdapterLayer)
        for tensor in module.own_tensors().values()
    }
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for parameter, unit in _owned(model, model, frozenset(units)):
        owners.setdefault(parameter, set()).add(unit)
    return {
        parameter: next(iter(found))
        for parameter, found in owners.items()
        # What two units share, such as a tied weight, neither of them may let go of.
        if len(found) == 1
        and parameter.ndim > 0
        and not parameter.requires_grad
        and parameter not in adapters
    }


def _owned(
    module: nn.Module, unit: nn.Module, units: frozenset[nn.Module]
) -> Iterator[tuple[nn.Parameter, nn.Module]]:
    for parameter in module.parameters(recurse=False):
        yield parameter, unit
    for child in module.children():
        yield from _owned(child, child if child in units else unit, units)


def _keep_in_step(unit: nn.Module, group: Group) -> None:
    """Ask before a unit is gathered, forward or backward, whether another process has failed.

    Hooks run in the order of their registration; those of FSDP are between the two of each pair.
    """

    def before(*_: Any) -> None:
        group.meet()
        group.begin_exchange()

    def after(*_: Any) -> None:
        group.end_exchange()

    def on_gradient(act: Any) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                for tensor in _tensors(output):
                    if tensor.requires_grad:
                        tensor.register_hook(act)

        return hook

    unit.register_forward_pre_hook(before, prepend=True)
    unit.register_forward_pre_hook(after)
    unit.register_forward_hook(on_gradient(before), prepend=True)
    unit.register_forward_hook(on_gradient(after))


def _gather_to_generate(model: Any, group: Group) -> None:
    """Gather what is in no block before the model generates: an encoder may be called by itself."""
    plain = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        group.meet()
        group.begin_exchange()
        model.unshard()
        group.end_exchange()
        try:
            return plain(*args, **kwargs)
        finally:
            model.reshard()

    model.generate = generate


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in what a module returns."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def refused(rule: str, *, fix: str) -> UserError:
    """Return the error that the base cannot be spread; `rule` is the end of "must ..."."""
    return UserError(
        Problem(
            id="distributed.no-sharding",
            message=f"`{KEY}` must {rule}, but is true.",
            key=KEY,
            fix=fix,
        )
    )
