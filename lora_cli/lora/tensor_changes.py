"""What merging an adapted layer does to each of its tensors, told by the class of the layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lora_cli.lora.adalora import AdaLoraLinear
from lora_cli.lora.conv import LoraConv
from lora_cli.lora.dora import DoraConv, DoraEmbedding, DoraLinear
from lora_cli.lora.embedding import LoraEmbedding
from lora_cli.lora.kinds import is_conv1d
from lora_cli.lora.layer import AdapterLayer
from lora_cli.lora.linear import LoraLinear
from lora_cli.lora.parameter import LoraParameter
from lora_cli.lora.tokens import TokenEmbedding
from lora_cli.lora.updates import Change, LowRank, Rescaled, SomeRows, Stack
from lora_cli.lora.vera import SHARED_NAME, VeraLinear

# Returns the value of one of the layer's own tensors, by its name in adapter state.
Tensors = Callable[[str], torch.Tensor]
_BASE = "base_layer."


class NoChangeError(Exception):
    """What a layer does cannot be said of its tensors one by one; the message says why."""


def changes_of(
    layer: AdapterLayer, name: str, tensors: Tensors, tokens: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, Change]]:
    """Yield the tensors that merging changes, and what becomes of them.

    Args:
        layer: The outermost layer at a path; its own tensors may be on the meta device.
        name: The path.
        tensors: Values by name.
        tokens: Numbers of the trained rows by path of the embedding.

    Yields:
        Name of the tensor in the merged model, and the change.

    Raises:
        NoChangeError: If that cannot be said for the layer.
    """
    if isinstance(layer, LoraParameter):
        yield from _of_parameters(layer, name, "", tensors)
        return
    if isinstance(layer, TokenEmbedding):
        trained = tensors(f"{name}.token_adapter.trainable_tokens_delta")
        yield f"{name}.weight", SomeRows(dict(zip(tokens[name], trained, strict=True)))
        return
    yield f"{name}.weight", _of_weight(layer, name, tensors)


def _of_weight(layer: Any, name: str, tensors: Tensors) -> Change:
    """Return what becomes of the weight of a layer that has one."""

    def own(leaf: str) -> torch.Tensor:
        return tensors(f"{name}.{leaf}")

    transposed = is_conv1d(layer.base_layer)
    match layer:
        case VeraLinear():
            A = tensors(f"{SHARED_NAME}.A")[:, : layer.in_features]
            B = tensors(f"{SHARED_NAME}.B")[: layer.out_features]
            left, right = own("vera_lambda_b")[:, None] * B, own("vera_lambda_d")[:, None] * A
            return LowRank(right, left, 1.0, transposed)
        case AdaLoraLinear():
            return LowRank(own("lora_A") * own("lora_E"), own("lora_B"), layer.scale, transposed)
        case DoraConv() | DoraEmbedding():
            raise NoChangeError("has lengths that are not those of the rows of a matrix")
        case LoraEmbedding():
            return LowRank(own("lora_embedding_A"), own("lora_embedding_B"), layer.scale, True)
        case LoraConv() | LoraLinear():
            return _of_factors(layer, own, transposed=transposed)
    raise NoChangeError(f"is {type(layer).__name__}")


def _of_factors(layer: Any, own: Tensors, *, transposed: bool) -> Change:
    """Return what becomes of the weight of a layer that multiplies by A and by B."""
    if isinstance(layer, LoraConv) and layer.base_layer.groups > 1:
        raise NoChangeError("becomes a convolution without groups")
    if layer.lora_B.bias is not None:
        raise NoChangeError("has an update with a bias")
    A, B = own("lora_A.weight").flatten(1), own("lora_B.weight").flatten(1)
    if not isinstance(layer, DoraLinear):
        return LowRank(A, B, layer.scale, transposed)
    if transposed:
        raise NoChangeError("has lengths that are not those of the rows of a matrix")
    return Rescaled(A, B, layer.scale, own("lora_magnitude_vector").flatten())


def _of_parameters(
    layer: Any, name: str, within: str, tensors: Tensors
) -> Iterator[tuple[str, Change]]:
    """Yield the parameters of a module that are adapted by layers around each other."""
    while isinstance(layer, LoraParameter):
        A = tensors(f"{name}.{within}lora_A.weight")
        B = tensors(f"{name}.{within}lora_B.weight")
        place = f"{name}.{within.replace(_BASE, '')}{layer.parameter_name}"
        yield place, _of_parameter(layer, A, B)
        layer, within = layer.base_layer, f"{within}{_BASE}"
    for child, module in layer.named_children():
        if isinstance(module, LoraParameter):
            yield from _of_parameters(module, name, f"{within}{child}.", tensors)


def _of_parameter(layer: LoraParameter, A: torch.Tensor, B: torch.Tensor) -> Change:
    count, scale = layer.num_matrices, layer.scale
    height = (layer.lora_A.in_features, layer.lora_B.out_features)[not layer.transposed]
    if count == 1 and not layer.transposed and layer.is_matrix:
        return LowRank(A, B, scale)
    rows = A.unflatten(0, (count, -1))
    columns = B.unflatten(1, (-1, count)).permute(2, 0, 1)
    parts = [
        LowRank(a, b.contiguous(), scale, layer.transposed)
        for a, b in zip(rows, columns, strict=True)
    ]
    return Stack(parts, height)
