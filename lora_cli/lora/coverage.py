"""What there is to adapt in a model, what an adapter reaches of it, and what that costs."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_cli.lora.blocks import describe_blocks
from lora_cli.lora.initial import FROM_WEIGHT
from lora_cli.lora.kinds import is_linear, kind_of, linear_sizes
from lora_cli.lora.layer import AdapterLayer
from lora_cli.lora.planning import AdapterPlan, put_adapter
from lora_cli.lora.portable import to_portable
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.state import live_tensors

# A weight that is no layer: `lora.target_parameters` names it.
PARAMETER = "parameter"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerGroup:
    """Layers of the same last name, kind and shape.

    Attributes:
        name: Last part of their paths; the last two of a parameter.
        kind: See `lora_cli.lora.kinds.kind_of`; "parameter" for a fused weight.
        shape: Of the stored weight.
        size: The shape as a person reads it: "768 -> 3072".
        names: Paths, in module order.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    size: str
    names: tuple[str, ...]

    @property
    def blocks(self) -> str:
        """The blocks that they are in, such as "0-11"; empty for layers outside of all."""
        return describe_blocks(self.names)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What an adapter adds to a model.

    Attributes:
        total: Parameters of the model with the adapter in it.
        trained: Parameters that the optimizer updates.
        tensors: Name, dtype and shape of what the adapter file holds, without numbers.
    """

    total: int
    trained: int
    tensors: Mapping[str, torch.Tensor]

    @property
    def share(self) -> float:
        """Trained parameters as a share of all."""
        return self.trained / self.total


def list_layers(model: nn.Module) -> tuple[LayerGroup, ...]:
    """Return everything in a model that a variant can adapt, in module order."""
    found: dict[tuple[str, str, tuple[int, ...], str], list[str]] = {}
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is not None:
            shape, size = _shape(module)
            found.setdefault((name.rpartition(".")[2], kind, shape, size), []).append(name)
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                path = f"{name}.{leaf}"
                last, shape = ".".join(path.split(".")[-2:]), tuple(parameter.shape)
                key = (last, PARAMETER, shape, " x ".join(map(str, shape)))
                found.setdefault(key, []).append(path)
    return tuple(
        LayerGroup(name=name, kind=kind, shape=shape, size=size, names=tuple(names))
        for (name, kind, shape, size), names in found.items()
    )


def describe_plan(
    plan: AdapterPlan, tokens: Mapping[str, Sequence[int]], *, note: str = ""
) -> list[str]:
    """Say in a few lines what an adapter reaches.

    Args:
        plan: What gets an adapter.
        tokens: Numbers of the tokens whose rows are trained, by path of the embedding.
        note: Put behind what is trained whole.
    """
    by_name: dict[str, list[str]] = {}
    for name in plan.parameters:
        by_name.setdefault(".".join(name.split(".")[-2:]), []).append(name)
    found = {**plan.targets.by_pattern, **by_name}
    matched = ", ".join(_describe(pattern, names) for pattern, names in found.items())
    lines = [f"adapters: {matched}", f"trained whole: {', '.join(plan.saved) or 'nothing'}{note}"]
    rows = ", ".join(f"{len(indices)} rows of {name}" for name, indices in tokens.items())
    return [*lines, f"trained tokens: {rows}"] if rows else lines


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of parameters of a model, and of those that are trained."""
    sizes = [(_size(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def _size(parameter: nn.Parameter) -> int:
    """Return how many numbers a parameter stands for: in 4 bits, two to a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)


def cost_of(
    model: Any,
    plan: AdapterPlan,
    settings: LoraSettings,
    *,
    tokens: Mapping[str, Sequence[int]],
) -> Cost:
    """Return what an adapter costs, by putting it into a copy of a model on the meta device.

    Args:
        model: On the meta device; it is left as it was.
        plan: What gets an adapter.
        settings: Variant, ranks and strengths.
        tokens: Numbers of tokens to train the rows of, by path of the embedding.

    Raises:
        UserError: If the variant cannot adapt one of the layers with these settings.
    """
    twin = copy.deepcopy(model)
    put_adapter(twin, plan, settings, tokens=tokens)
    if settings.init in FROM_WEIGHT:
        _start(twin)
    total, trained = count_parameters(twin)
    tensors, _ = to_portable(live_tensors(twin, plan.saved), settings)
    return Cost(total=total, trained=trained, tensors=tensors)


def _start(model: nn.Module) -> None:
    """Give every layer a start, as files hold it beside the factors."""
    for module in model.modules():
        if isinstance(module, AdapterLayer) and hasattr(module, "start_from"):
            layer: Any = module
            layer.start_from(layer.lora_A.weight, layer.lora_B.weight)


def _describe(pattern: str, names: Sequence[str]) -> str:
    blocks = describe_blocks(names)
    layers = f"{len(names)} layer{'' if len(names) == 1 else 's'}"
    return f"{pattern}: {layers}{f' ({blocks})' if blocks else ''}"


def _shape(module: Any) -> tuple[tuple[int, ...], str]:
    if is_linear(module):
        shape, (inputs, outputs) = tuple(module.weight.shape), linear_sizes(module)
        return shape, f"{inputs} -> {outputs}"
    if isinstance(module, nn.MultiheadAttention):
        size = module.embed_dim
        return (3 * size, size), f"{size} -> {size}"
    shape = tuple(module.weight.shape)
    if isinstance(module, nn.Embedding):
        return shape, f"{shape[0]} x {shape[1]}"
    kernel = "x".join(map(str, module.kernel_size))
    return shape, f"{module.in_channels} -> {module.out_channels}, {kernel}"
