"""Layers of every kind, the same ones adapted by PEFT, and what a backward pass keeps."""

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from lora_cli.lora.build import build_layer
from lora_cli.lora.layer import AdapterLayer
from lora_cli.lora.settings import LoraSettings


@dataclass(frozen=True)
class Case:
    """A layer to adapt, and the shape of its input; without one its input is row numbers."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] | None = None

    def inputs(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        if self.shape is None:
            return torch.randint(0, 11, (2, 5), generator=generator)
        return torch.randn(self.shape, generator=generator).to(dtype)


CASES = {
    "linear": Case(lambda: nn.Linear(7, 5), (2, 3, 7)),
    "linear-no-bias": Case(lambda: nn.Linear(7, 5, bias=False), (4, 7)),
    "conv1d-transformers": Case(lambda: _random(Conv1D(5, 7)), (2, 3, 7)),
    "embedding": Case(lambda: nn.Embedding(11, 6)),
    "embedding-padding": Case(lambda: _random(nn.Embedding(11, 6, padding_idx=0))),
    "embedding-frequency": Case(lambda: nn.Embedding(11, 6, scale_grad_by_freq=True)),
    "embedding-gemma": Case(lambda: Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=6**0.5)),
    "embedding-bart": Case(lambda: BartScaledWordEmbedding(11, 6, 0, embed_scale=6**0.5)),
    "conv1d": Case(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": Case(lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 4, 5, 6)),
    "conv2d-patches": Case(lambda: nn.Conv2d(3, 8, 4, stride=4, bias=False), (2, 3, 8, 8)),
    "conv2d-kernel-1": Case(lambda: nn.Conv2d(4, 6, 1), (2, 4, 3, 3)),
    "conv3d": Case(lambda: nn.Conv3d(2, 4, 3, padding="same"), (2, 2, 3, 4, 3)),
}
GROUPED = Case(lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5))
# For each variant: how PEFT calls it.
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
    "lora_fa": {},
}


def pairs() -> list[tuple[str, str]]:
    """Return every kind of layer with every variant that it has."""
    return [
        (kind, variant)
        for kind in CASES
        for variant in VARIANTS
        if variant != "lora_fa" or not kind.startswith("embedding")
    ]


def settings_of(variant: str, *, r: int = 2, alpha: float = 5.0, **more: Any) -> LoraSettings:
    rslora = variant.endswith("rslora")
    name = variant.removesuffix("-rslora").replace("rslora", "lora")
    return LoraSettings(r=r, alpha=alpha, variant=name, rslora=rslora, **more)


def adapt(case: Case, variant: str, *, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """Return an adapted layer, moved off its start so that nothing is equal by chance."""
    torch.manual_seed(0)
    base = case.make().to(dtype)
    layer = build_layer(base, "block.layer", settings_of(variant, **more))
    shake(layer)
    return layer


def shake(layer: AdapterLayer) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, tensor in sorted(layer.own_tensors().items()):
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.layer(*inputs)


def peft_twin(layer: Any, variant: str, *, r: int = 2, alpha: int = 5, **more: Any) -> Any:
    """Return a model whose `layer` is that of PEFT with the same base and adapter weights."""
    base = copy.deepcopy(layer.base_layer)
    config = LoraConfig(
        r=r, lora_alpha=alpha, target_modules=["layer"], **VARIANTS[variant], **more
    )
    model = get_peft_model(Holder(base), config)
    theirs = dict(peft_tensors(model))
    assert theirs.keys() == layer.own_tensors().keys()
    with torch.no_grad():
        for name, tensor in layer.own_tensors().items():
            assert theirs[name].shape == tensor.shape
            assert theirs[name].dtype == tensor.dtype
            theirs[name].copy_(tensor)
    return model


def peft_tensors(model: Any) -> dict[str, nn.Parameter]:
    """Return PEFT's adapter parameters by the names that its files give them."""
    found = {
        name.removeprefix("base_model.model.layer."): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    return {_in_file(name): parameter for name, parameter in found.items()}


def _in_file(name: str) -> str:
    for vector in ("lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B"):
        if name.startswith(vector):
            return vector
    return name.replace(".default", "")


class _Kept:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept_tensors(
    run: Callable[[], torch.Tensor], known: nn.Module, inputs: torch.Tensor
) -> list[torch.Tensor]:
    """Return what `run` keeps for the backward pass, a storage once.

    Weights of `known` and the inputs themselves, which are there anyway, are left out, and so is
    what is freed before `run` returns.
    """
    alive: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Kept:
        kept = _Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        output = run()
    owned = {tensor.untyped_storage().data_ptr() for tensor in known.state_dict().values()}
    owned.add(inputs.untyped_storage().data_ptr())
    owned.update(buffer.untyped_storage().data_ptr() for buffer in known.buffers())
    found = {kept.tensor.untyped_storage().data_ptr(): kept.tensor for kept in alive}
    assert output.requires_grad
    return [tensor for pointer, tensor in found.items() if pointer not in owned]


def kept_bytes(run: Callable[[], torch.Tensor], known: nn.Module, inputs: torch.Tensor) -> int:
    """Return the size of `kept_tensors`, in bytes."""
    return sum(t.untyped_storage().nbytes() for t in kept_tensors(run, known, inputs))


def _random(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer
