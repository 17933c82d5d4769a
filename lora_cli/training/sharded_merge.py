"""Merging adapters into a base that is spread over the processes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_cli.lora.layer import AdapterLayer, SharedTensors
from lora_cli.training.sharding import is_sharded, local_share


@torch.no_grad()
def merge_sharded(model: nn.Module) -> None:
    """Merge as `lora_cli.lora.merge.merge_lora` does, block by block, with each share in place.

    Every process computes the merged weights of a block, and keeps its share of them.

    Raises:
        ValueError: If the model holds no adapter.
    """
    found = list(_adapted(model, model))
    if not found:
        raise ValueError("The model must hold LoRA layers to be merged, but has none.")
    plain: dict[nn.Module, nn.Module] = {}
    for unit in dict.fromkeys(place.unit for place in found):
        layers = dict.fromkeys(place.layer for place in found if place.unit is unit)
        _call(unit, "unshard")
        merged = {layer: layer.merged() for layer in layers}
        values = {
            layer: {name: value.detach().clone() for name, value in module.named_parameters()}
            for layer, module in merged.items()
        }
        _call(unit, "reshard")
        for layer, module in merged.items():
            plain[layer] = _put_back(layer, module, values[layer])
    for place in found:
        setattr(place.parent, place.name, plain[place.layer])
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, SharedTensors):
                delattr(module, name)


@torch.no_grad()
def round_trained(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Round trained weights once to the number formats of the base, in place.

    As `lora_cli.lora.strategies.round_to`, but the model goes on computing in the formats that it
    has.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name in dtypes:
            parameter.copy_(parameter.to(dtypes[name]))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an adapted layer is."""

    unit: nn.Module
    parent: nn.Module
    name: str
    layer: AdapterLayer


def _adapted(module: nn.Module, unit: nn.Module) -> Iterator[_Place]:
    """Yield the adapted layers, those within others left out, on each path to them."""
    for name, child in module._modules.items():
        if isinstance(child, AdapterLayer):
            yield _Place(unit, module, name, child)
        elif child is not None:
            yield from _adapted(child, child if is_sharded(child) else unit)


def _put_back(
    layer: AdapterLayer, merged: nn.Module, values: Mapping[str, torch.Tensor]
) -> nn.Module:
    """Return the layer without its adapter, with the share of `values` that belongs here."""
    base = _without_adapters(layer)
    own = dict(base.named_parameters())
    if any(name in own and own[name].shape != value.shape for name, value in values.items()):
        # Another kind of layer, such as a convolution of one group for one of several.
        base, own = merged, {}
    for name, value in values.items():
        if name in own:
            local = local_share(own[name])
            local.copy_(_share_of(own[name], value))
        else:
            owner, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    return base


def _without_adapters(layer: AdapterLayer) -> nn.Module:
    base: nn.Module = layer.base_layer
    while isinstance(base, AdapterLayer):
        base = base.base_layer
    for name, child in list(base.named_children()):
        if isinstance(child, AdapterLayer):
            setattr(base, name, _without_adapters(child))
    return base


def _share_of(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """Return the rows of a whole tensor that this process keeps of a parameter."""
    if not hasattr(parameter, "device_mesh"):
        return value
    mesh = parameter.device_mesh
    start = mesh.get_local_rank() * -(-value.shape[0] // mesh.size())
    return value[start : start + len(local_share(parameter))]


def _call(unit: Any, name: str) -> None:
    """Gather a unit or let go of it; a model without blocks of its own may be none."""
    getattr(unit, name)()
