"""Add the adapters into the base weights."""

from torch import nn

from lora_cli.lora.layer import AdapterLayer, SharedTensors
from lora_cli.lora.tokens import TiedTokens, TokenEmbedding


def merge_lora(model: nn.Module) -> None:
    """Replace every adapted layer by its `merged()` layer, in place, the innermost first.

    Raises:
        ValueError: If the model holds no adapter, so that a second merge cannot pass for a first.
    """
    names = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, AdapterLayer)
    ]
    if not names:
        raise ValueError("The model must hold LoRA layers to be merged, but has none.")
    tables: dict[nn.Module, nn.Module] = {}
    followers: list[tuple[nn.Module, TokenEmbedding]] = []
    for name in reversed(names):
        layer = model.get_submodule(name)
        if not isinstance(layer, AdapterLayer):
            continue  # Its parent has several paths, and was seen on another one.
        parent, _, last = name.rpartition(".")
        plain = tables.get(layer) or layer.merged()
        setattr(model.get_submodule(parent), last, plain)
        # Other layers are let go of here, so that no more than one old weight is held.
        if isinstance(layer, TokenEmbedding):
            tables[layer] = plain
        elif isinstance(layer, TiedTokens):
            followers.append((plain, layer.source))
    for plain, source in followers:
        plain.weight = tables[source].weight
    for name, module in list(model.named_modules()):
        if isinstance(module, SharedTensors):
            parent, _, last = name.rpartition(".")
            delattr(model.get_submodule(parent), last)
