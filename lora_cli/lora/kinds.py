"""The kinds of layers that can be adapted, and the weights of linear ones in one layout.

Classes of other libraries are told by name, so that none of them needs to be installed.
"""

from typing import Any, TypeGuard

import torch
from torch import nn

# Read by the layer that holds them and never called, so an adapter there would do nothing.
_NEVER_CALLED = (nn.modules.linear.NonDynamicallyQuantizableLinear,)
# Layers that do so with plain linear layers.
_READERS = ("WavLMAttention",)
# Writes the product of nn.Linear in its own words.
_SAME_FORWARD = ("FalconLinear",)
_QUANTIZED = ("Linear8bitLt", "Linear4bit")


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is a linear layer of transformers whose weight is (in, out), as in GPT-2."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a linear layer of bitsandbytes, in 8 or 4 bits."""
    names = (cls.__module__.partition(".")[0] for cls in type(module).__mro__)
    return type(module).__name__ in _QUANTIZED and "bitsandbytes" in names


def kind_of(module: nn.Module) -> str | None:
    """Return the kind of a layer, or None where it cannot be adapted.

    Returns:
        "linear", "conv1d" (of transformers), "quantized", "embedding", "conv" (1, 2 or 3
        dimensions) or "attention" (`nn.MultiheadAttention`).
    """
    if is_quantized(module):
        return "quantized"
    if is_conv1d(module):
        return "conv1d"
    if isinstance(module, nn.Linear):
        is_called = not isinstance(module, _NEVER_CALLED)
        return "linear" if is_called and _multiplies(module) else None
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    return "attention" if isinstance(module, nn.MultiheadAttention) else None


def _multiplies(module: nn.Linear) -> bool:
    """Whether a linear layer computes what its class says: some routers do something else."""
    return type(module).forward is nn.Linear.forward or type(module).__name__ in _SAME_FORWARD


def read_by_others(model: nn.Module) -> dict[str, str]:
    """Return the paths of linear layers that are never called, with the class that reads them."""
    return {
        f"{path}.{name}" if path else name: type(module).__name__
        for path, module in model.named_modules()
        if type(module).__name__ in _READERS
        for name, child in module.named_children()
        if name.endswith("_proj") and isinstance(child, nn.Linear)
    }


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer computes ``x W^T + b``, however it keeps W."""
    return kind_of(module) in ("linear", "conv1d", "quantized")


def linear_sizes(layer: Any) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear layer of any kind."""
    if is_conv1d(layer):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


def dense_weight(layer: Any) -> torch.Tensor:
    """Return the weight of a linear layer as (out_features, in_features).

    It is a view of the stored weight where that is dense, and a new dequantized tensor where it
    is not.
    """
    if is_quantized(layer):
        from lora_cli.lora.quantized import dequantized_weight

        return dequantized_weight(layer)
    weight: torch.Tensor = layer.weight
    return weight.T if is_conv1d(layer) else weight


def dense_layer(
    layer: Any, weight: torch.Tensor, *, extra_bias: torch.Tensor | None = None
) -> nn.Module:
    """Return a frozen layer like `layer` but with another weight, given as (out, in).

    Args:
        layer: A linear layer of any kind; a quantized one becomes a plain one.
        weight: Its dtype is that of the new layer.
        extra_bias: Added to the bias, which is made where there is none; shape (out,).
    """
    in_features, out_features = linear_sizes(layer)
    bias = None if layer.bias is None else layer.bias.detach().clone()
    if extra_bias is not None:
        old = torch.zeros_like(extra_bias) if bias is None else bias
        bias = add_in_float(old, extra_bias).to(weight.dtype if bias is None else bias.dtype)
    plain: nn.Module
    if is_conv1d(layer):
        with torch.device("meta"):
            plain = type(layer)(out_features, in_features)
        weight = weight.T.contiguous()
    else:
        plain = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias, requires_grad=False)
    return plain.train(layer.training)


def add_in_float(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Return ``weight + delta``, summed in float32 or wider and rounded once to the first's dtype.

    Autocast would round the products that led to `delta`; callers compute it with that disabled.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.detach().to(wide) + delta.to(wide)).to(weight.dtype)
