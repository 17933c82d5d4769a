"""The weights of linear layers that bitsandbytes keeps in 8 or 4 bits."""

from typing import Any

import torch
from torch import nn

from lora_cli.lora.kinds import is_quantized


@torch.no_grad()
def dequantized_weight(layer: Any) -> torch.Tensor:
    """Return what a quantized linear layer multiplies with, as a new dense tensor.

    LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) keeps for each output row whole numbers q
    and the largest absolute value m, and stands for ``q m / 127``. NF4 (arXiv:2305.14314) keeps for
    blocks of 64 weights their places in a table of 16 values, times the largest of the block.

    Args:
        layer: `Linear8bitLt` or `Linear4bit` of bitsandbytes, already quantized.

    Returns:
        Shape (out_features, in_features); float32 for 8 bits, the dtype that was quantized for 4.
    """
    if type(layer).__name__ == "Linear8bitLt":
        # The first forward pass moves both from the parameter to the state of the layer.
        held = layer.weight if layer.state.SCB is None else layer.state
        numbers: torch.Tensor = layer.weight.data
        largest: torch.Tensor = held.SCB
        return numbers.to(torch.float32) * (largest.to(torch.float32)[:, None] / 127)
    from bitsandbytes.functional import dequantize_4bit

    weight: torch.Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


def restore_weights(model: nn.Module, whole: nn.Module) -> None:
    """Put layers as they were before quantization in the place of quantized ones, in place.

    Adapters stay: they go on with the weights that they will be merged into.

    Args:
        model: The model, possibly with adapters around its layers.
        whole: The same base model without adapters, not quantized; it gives its layers away.
    """
    for name, module in list(model.named_modules()):
        if not is_quantized(module):
            continue
        device = next(module.parameters()).device
        original = whole.get_submodule(name.replace(".base_layer", "")).to(device)
        parent, _, last = name.rpartition(".")
        plain = original.requires_grad_(False).train(module.training)
        if module.bias is not None:
            # It was never quantized, and may have been trained.
            plain.bias = module.bias
        setattr(model.get_submodule(parent), last, plain)
