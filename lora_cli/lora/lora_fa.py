"""LoRA-FA: A stays as it starts (Zhang et al. 2023, "LoRA-FA", arXiv:2308.03303)."""

from typing import Any

from torch import nn

from lora_cli.lora.conv import LoraConv
from lora_cli.lora.layer import AdapterLayer
from lora_cli.lora.linear import LoraLinear


class _FrozenA(AdapterLayer):
    """Trains B only; A is part of the adapter all the same, since B means nothing without it."""

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return B, without A."""
        frozen = self.own_tensors()["lora_A.weight"]
        return [value for value in super().trained_parameters() if value is not frozen]


class LoraFaLinear(_FrozenA, LoraLinear):
    """A `LoraLinear` whose A is not trained.

    The gradient of B is ``scale * g^T A(x)``, so of the inputs only their projections ``A(x)``, of
    shape (..., r), are kept for the backward pass. The gradient of A would need x itself, of shape
    (..., in_features): that is the memory which the method saves. B can still reach every direction
    of the output, but the update reads r fixed directions of the input. Dropout keeps its mask of
    the inputs besides, wherever x itself needs a gradient: without it, less is kept.

    Takes the arguments of `LoraLinear`.
    """

    def __init__(self, base: nn.Linear, **options: Any) -> None:
        super().__init__(base, **options)
        self.lora_A.requires_grad_(False)


class LoraFaConv(_FrozenA, LoraConv):
    """A `LoraConv` whose A is not trained.

    Torch keeps the input of every convolution whose input or weight needs a gradient, so memory is
    saved only where the input needs none, as in the patch embedding of a vision model.

    Takes the arguments of `LoraConv`.
    """

    def __init__(self, base: nn.Conv1d | nn.Conv2d | nn.Conv3d, **options: Any) -> None:
        super().__init__(base, **options)
        self.lora_A.requires_grad_(False)
