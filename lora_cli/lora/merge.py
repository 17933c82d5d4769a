"""Add the adapters into the base weights."""

from torch import nn

from lora_cli.lora.linear import LoraLinear


def merge_lora(model: nn.Module) -> None:
    """Replace every `LoraLinear` by its `merged()` layer, in place.

    Raises:
        ValueError: If the model holds no adapter, so that a second merge cannot pass for a first.
    """
    layers = [
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear)
    ]
    if not layers:
        raise ValueError("The model must hold LoRA layers to be merged, but has none.")
    for name, layer in layers:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.merged())
