"""Which parts of a model are not the pretrained body: heads and output embeddings."""

from typing import Any

import torch
from torch import nn

# Where a model does not say which of its parts is the body, as those of T5 and Whisper do not.
_HEADS = (
    *("classifier", "classification_head", "score", "qa_outputs", "lm_head"),
    *("decode_head", "auxiliary_head"),
)
# Parts of the body of RT-DETR and its like that have a place for each class.
_INSIDE = ("class_embed", "enc_score_head")


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the modules that make something of what the body computes.

    Models of transformers name their body (`base_model`); what stands beside it is a head. That
    goes for models inside of a model too.
    """
    heads = list(inner_heads(model))
    for path, module in model.named_modules():
        if not hasattr(module, "base_model_prefix"):
            continue
        inner: Any = module
        body = inner.base_model
        for name, child in module.named_children():
            beside = child is not body if body is not module else name.endswith(_HEADS)
            if beside:
                heads.append(f"{path}.{name}" if path else name)
    return tuple(heads)


def renew_heads(model: Any, *, seed: int) -> tuple[str, ...]:
    """Give the heads of a model new random values, as loading it without a head would, in place.

    Args:
        model: A model of transformers.
        seed: Decides the values; the caller's random state is kept.

    Returns:
        The names of the parameters, sorted.
    """
    heads = {name: model.get_submodule(name) for name in head_names(model)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for head in heads.values():
            for parameter in head.parameters():
                # Set in loading: values of a file are not to be lost.
                parameter._is_hf_initialized = False
            for module in head.modules():
                model._init_weights(module)
    return tuple(
        sorted(
            f"{name}.{own}" for name, head in heads.items() for own, _ in head.named_parameters()
        )
    )


def inner_heads(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the heads that stand inside of a body."""
    return tuple(path for path, _ in model.named_modules() if path.endswith(_INSIDE))


def output_embeddings(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the layers that turn states into scores of tokens."""
    found = []
    for module in model.modules():
        get_output = getattr(module, "get_output_embeddings", None)
        if get_output is None:
            continue
        try:
            found.append(get_output())
        # Parts of a model may inherit the method and have nothing to return.
        except (NotImplementedError, AttributeError):
            continue
    outputs = {id(layer) for layer in found if layer is not None}
    return tuple(name for name, module in model.named_modules() if id(module) in outputs)
