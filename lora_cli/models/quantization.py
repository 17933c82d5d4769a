"""A frozen base in 8 or 4 bits, by bitsandbytes: less memory, at the price of rounded weights."""

import logging
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli.errors import Problem, UserError
from lora_cli.models.heads import head_names, output_embeddings

KEY = "model.quantization"
# Largest share of a feature that LLM.int8() multiplies in 8 bits; larger ones stay in 16.
_OUTLIER = 6.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """What was quantized.

    Attributes:
        layers: Number of layers.
        bytes_before: Size of their weights before.
        bytes_after: Size of their weights now, with the numbers that scale them.
    """

    layers: int
    bytes_before: int
    bytes_after: int


def check_quantization(kind: str) -> None:
    """Check that the package is there which `model.quantization` needs.

    Raises:
        UserError: If it is not.
    """
    if kind == "none" or find_spec("bitsandbytes") is not None:
        return
    raise UserError(
        Problem(
            id="model.missing-extra",
            message=f"`{KEY}` must be none where bitsandbytes is not installed, but is {kind}.",
            key=KEY,
            fix='pip install "lora-cli[quantization]"',
        )
    )


def quantize_base(model: nn.Module, kind: str, *, keep: Collection[str]) -> Quantized:
    """Replace the linear layers of the body by quantized ones, in place.

    Left as they are: heads and output embeddings, layers that share a weight, and those that the
    architecture wants in float32. Weights are read unquantized first, so that they are checked and
    hashed as ever, and no more than that has to fit into memory.

    Args:
        model: The base model, before adapters are put in.
        kind: "int8" (LLM.int8(), arXiv:2208.07339) or "nf4" (with its scales quantized as well,
            QLoRA, arXiv:2305.14314).
        keep: Modules that are trained whole, by path; nothing inside them is quantized.

    Raises:
        UserError: If bitsandbytes is not installed, or there is no layer to quantize.
    """
    check_quantization(kind)
    # It warns on import about a faster kernel to be had from the hub, and in each pass about casts.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    convert = {"int8": _to_int8, "nf4": _to_nf4}[kind]
    names = _layers_to_quantize(model, keep)
    if not names:
        raise UserError(
            Problem(
                id="model.nothing-to-quantize",
                message=f"`{KEY}` must be none for a model whose body has no linear layers of "
                f"its own, but is {kind}.",
                key=KEY,
                fix=f"{KEY}=none",
            )
        )
    before = after = 0
    for name in names:
        parent, _, last = name.rpartition(".")
        layer: Any = model.get_submodule(name)
        before += layer.weight.nbytes
        quantized = convert(layer)
        after += _stored_bytes(quantized)
        setattr(model.get_submodule(parent), last, quantized.train(layer.training))
    return Quantized(layers=len(names), bytes_before=before, bytes_after=after)


def _layers_to_quantize(model: nn.Module, keep: Collection[str]) -> tuple[str, ...]:
    left_out = {*keep, *head_names(model), *output_embeddings(model)}
    wide = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    wide |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    owners = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    return tuple(
        name
        for name, module in model.named_modules()
        # Not subclasses: they may use their weight in ways of their own.
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and owners[id(module.weight)] == 1
        and not wide.intersection(name.split("."))
        and not any(name == other or name.startswith(f"{other}.") for other in left_out)
    )


def _weight_and_sizes(layer: Any) -> tuple[torch.Tensor, int, int]:
    """Return the weight as (out, in), then in and out."""
    weight = layer.weight.data.T.contiguous() if isinstance(layer, Conv1D) else layer.weight.data
    return weight, weight.shape[1], weight.shape[0]


def _to_int8(layer: Any) -> nn.Module:
    from bitsandbytes.nn.modules import Int8Params, Linear8bitLt

    weight, in_features, out_features = _weight_and_sizes(layer)
    quantized = Linear8bitLt(
        in_features,
        out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
        threshold=_OUTLIER,
        device="meta",
    )
    quantized.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return _finish(quantized, layer)


def _to_nf4(layer: Any) -> nn.Module:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    weight, in_features, out_features = _weight_and_sizes(layer)
    quantized = Linear4bit(
        in_features,
        out_features,
        bias=layer.bias is not None,
        compute_dtype=weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    quantized.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=quantized)
    # Some processors would otherwise get the weight in another layout at the first evaluation, in
    # which no gradient passes the layer any more.
    quantized.support_avx512bf16_for_cpu = False
    return _finish(quantized, layer)


def _finish(quantized: Any, layer: Any) -> nn.Module:
    quantized.bias = layer.bias
    # Moving to a device is what quantizes.
    moved: nn.Module = quantized.to(layer.weight.device)
    return moved.requires_grad_(False)


def _stored_bytes(layer: Any) -> int:
    if hasattr(layer.weight, "SCB"):
        size: int = layer.weight.nbytes + layer.weight.SCB.nbytes
        return size
    state = layer.weight.quant_state
    size = layer.weight.nbytes + state.absmax.nbytes
    return size + (state.state2.absmax.nbytes if state.nested else 0)
