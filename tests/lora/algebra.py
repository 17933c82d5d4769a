"""Adapted layers as matrix products in numpy, in float64 and without torch modules.

A linear layer multiplies its inputs, an embedding one-hot vectors, and a convolution the patches of
its input: with these as rows of X, all of them compute ``y = f * e * (X (W + s B A)^T) + b``.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Array = np.ndarray[Any, np.dtype[np.float64]]
_PADDING = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}


def array(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy()


@dataclass(frozen=True)
class Expected:
    """What the layer should give; rows are places of the output, columns its features."""

    output: Array
    merged: Array
    A: Array
    B: Array
    m: Array | None
    norms: Array


def expected(
    layer: Any, x: torch.Tensor, upstream: Array, *, scale: float, names: tuple[str, str]
) -> Expected:
    """Return outputs, merged weight and gradients of an adapted layer.

    Args:
        layer: The adapted layer; only its tensors are read.
        x: Its input.
        upstream: Gradient of the output, (places, out).
        scale: Factor of the update.
        names: Attributes with A and B among the layer's own tensors.
    """
    base, own = layer.base_layer, layer.own_tensors()
    X = rows(base, x)
    A, B = (array(own[name]) for name in names)
    A = A.reshape(A.shape[0], -1)
    groups = getattr(base, "groups", 1)
    B = _spread(B.reshape(B.shape[0], -1), groups)
    W = matrix(base)
    bias = 0.0 if getattr(base, "bias", None) is None else array(base.bias)
    e = float(getattr(base, "embed_scale", 1.0))
    V = W + scale * B @ A
    norms = np.sqrt((V**2).sum(1))
    m = array(own["lora_magnitude_vector"]).reshape(-1) if _has_m(own) else None
    f = np.ones(len(W)) if m is None else m / norms
    G = upstream * e
    grad_A = scale * ((G * f) @ B).T @ X
    if isinstance(base, nn.Embedding):
        ids = x.flatten().numpy()
        counts = np.bincount(ids, minlength=base.num_embeddings)
        if base.scale_grad_by_freq:
            grad_A = grad_A / np.maximum(counts, 1)
        if base.padding_idx is not None:
            grad_A[:, base.padding_idx] = 0
    return Expected(
        output=f * e * (X @ V.T) + bias,
        merged=f[:, None] * V,
        A=grad_A,
        B=_gather(scale * (G * f).T @ (X @ A.T), groups),
        m=None if m is None else (G * (X @ V.T)).sum(0) / norms,
        norms=norms,
    )


def _has_m(own: dict[str, torch.Tensor]) -> bool:
    return "lora_magnitude_vector" in own


def rows(base: Any, x: torch.Tensor) -> Array:
    """Return X."""
    if isinstance(base, nn.Embedding):
        found: Array = np.eye(base.num_embeddings)[x.flatten().numpy()]
        return found
    if isinstance(base, nn.Linear | Conv1D):
        return array(x).reshape(-1, x.shape[-1])
    return patches(base, array(x))


def places(base: Any, output: torch.Tensor) -> Array:
    """Return an output as (places, out)."""
    value = array(output)
    if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        value = np.moveaxis(value, 1, -1)
    return value.reshape(-1, value.shape[-1])


def matrix(base: Any) -> Array:
    """Return W as (out, in); that of a convolution with its groups on the diagonal."""
    W = array(base.weight)
    if isinstance(base, nn.Embedding | Conv1D):
        return W.T
    if isinstance(base, nn.Linear):
        return W
    whole = np.zeros((W.shape[0], base.in_channels, *W.shape[2:]))
    out, fan_in = W.shape[0] // base.groups, W.shape[1]
    for group in range(base.groups):
        own = slice(group * out, (group + 1) * out)
        whole[own, group * fan_in : (group + 1) * fan_in] = W[own]
    return whole.reshape(len(W), -1)


def patches(base: Any, x: Array) -> Array:
    """Return what each place of the output of a convolution sees, flattened."""
    size = base.kernel_size
    span = [d * (k - 1) for d, k in zip(base.dilation, size, strict=True)]
    if base.padding == "same":
        pads = [(s // 2, s - s // 2) for s in span]
    elif base.padding == "valid":
        pads = [(0, 0) for _ in span]
    else:
        pads = [(p, p) for p in base.padding]
    mode: Any = _PADDING[base.padding_mode]
    x = np.pad(x, [(0, 0), (0, 0), *pads], mode=mode)
    counts = [
        (n - s - 1) // step + 1 for n, s, step in zip(x.shape[2:], span, base.stride, strict=True)
    ]
    found = []
    for sample in x:
        for place in itertools.product(*(range(count) for count in counts)):
            starts = [p * step for p, step in zip(place, base.stride, strict=True)]
            window = tuple(
                slice(start, start + s + 1, d)
                for start, s, d in zip(starts, span, base.dilation, strict=True)
            )
            found.append(sample[(slice(None), *window)].reshape(-1))
    return np.array(found)


def _spread(B: Array, groups: int) -> Array:
    """Return B as one matrix: group by group on the diagonal."""
    out, r = B.shape[0] // groups, B.shape[1]
    whole = np.zeros((B.shape[0], r * groups))
    for group in range(groups):
        own = slice(group * out, (group + 1) * out)
        whole[own, group * r : (group + 1) * r] = B[own]
    return whole


def _gather(B: Array, groups: int) -> Array:
    """Undo `_spread`."""
    out, r = B.shape[0] // groups, B.shape[1] // groups
    return np.concatenate([B[g * out : (g + 1) * out, g * r : (g + 1) * r] for g in range(groups)])


def compare(layer: Any, x: torch.Tensor, *, scale: float, tolerance: float = 1e-4) -> Expected:
    """Check outputs, gradients and merged weight of an adapted layer, and return the truth."""
    base, own = layer.base_layer, layer.own_tensors()
    names = ("lora_embedding_A", "lora_embedding_B")
    if names[0] not in own:
        names = ("lora_A.weight", "lora_B.weight")
    output = layer(x)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    for tensor in own.values():
        tensor.grad = None
    output.backward(upstream.to(output.dtype))
    truth = expected(layer, x, places(base, upstream), scale=scale, names=names)
    close(places(base, output), truth.output, tolerance)
    for name, gradient in zip(names, (truth.A, truth.B), strict=True):
        if own[name].requires_grad:
            found = array(own[name].grad)
            close(found.reshape(gradient.shape), gradient, tolerance)
        else:
            assert own[name].grad is None
    if truth.m is not None:
        close(array(own["lora_magnitude_vector"].grad).reshape(-1), truth.m, tolerance)
    merged = layer.merged()
    close(matrix(merged), truth.merged, tolerance)
    close(places(base, merged(x)), truth.output, tolerance)
    return truth


def close(found: Array, wanted: Array, tolerance: float) -> None:
    """Compare, with a tolerance in proportion to the largest number."""
    size = 1 + np.abs(wanted).max(initial=0)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * size)
