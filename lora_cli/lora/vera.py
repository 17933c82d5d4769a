r"""VeRA: one pair of random frozen factors for all layers (Kopiczko et al. 2023, arXiv:2310.11454).

Each layer trains two vectors alone, which scale the rows of the shared factors.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lora_cli.lora.dense import DenseUpdateLayer
from lora_cli.lora.kinds import linear_sizes
from lora_cli.lora.layer import AdapterLayer, SharedTensors
from lora_cli.lora.settings import LoraSettings

# Where the shared factors are in the model; their names in adapter state begin with it.
SHARED_NAME = "vera_shared"


class SharedFactors(SharedTensors):
    """The random factors of a model, as buffers: saved with the adapter, moved with the model.

    ``A`` is (r, columns) and ``B`` is (rows, r), uniform with the spread ``sqrt(2 / fan_in)`` of
    He et al. 2015, arXiv:1502.01852, drawn from a generator of their own: first A, then B, which
    is what PEFT draws from the same seed.

    Args:
        r: Rank.
        sizes: Columns of A and rows of B.
        seed: Of the generator.
        device: Where they are put.
    """

    def __init__(self, *, r: int, sizes: tuple[int, int], seed: int, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        columns, rows = sizes
        self.A: torch.Tensor
        self.B: torch.Tensor
        self.register_buffer("A", _uniform(r, columns, generator).to(device))
        self.register_buffer("B", _uniform(rows, r, generator).to(device))


def _uniform(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


class VeraLinear(DenseUpdateLayer):
    r"""A frozen linear layer plus an update of shared random factors that two vectors scale.

    Computes ``y = base(x) + b * (B (d * (A dropout(x))))``, equation 2 of the paper. A and B are
    the first columns and the first rows of the shared factors, as many as the layer has inputs and
    outputs. ``b`` starts at zero, so a new layer returns exactly ``base(x)``.

    Parameters, named as in PEFT's files, both trained and float32:

    ==================  ===============
    name                shape
    ==================  ===============
    ``vera_lambda_d``   (r,)
    ``vera_lambda_b``   (out_features,)
    ==================  ===============

    Args:
        base: The layer to adapt, kept and frozen in place.
        r: Rank of the shared factors.
        d_initial: Start of every entry of ``d``.
        dropout: Chance of zeroing each input element on the adapter path, in training only.

    Raises:
        ValueError: If ``r`` is below 1, or ``dropout`` is outside [0, 1).
    """

    def __init__(
        self, base: nn.Module, *, r: int, d_initial: float = 0.1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"r must be at least 1, but is {r}.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), but is {dropout}.")
        self.in_features, self.out_features = linear_sizes(base)
        self.base_layer = base.requires_grad_(False)
        device = self.base_layer.weight.device
        self.vera_lambda_d = nn.Parameter(torch.full((r,), d_initial, device=device))
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.out_features, device=device))
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self._shared: tuple[SharedFactors, ...] = ()
        self.train(base.training)

    def share(self, factors: SharedFactors) -> None:
        """Use these factors, without owning them."""
        # In a tuple, since a module registers every module that it is given.
        self._shared = (factors,)

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        (factors,) = self._shared
        return factors.A[:, : self.in_features], factors.B[: self.out_features]

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``b * (B (d * (A dropout(x))))``."""
        A, B = self._factors()
        inner = functional.linear(self.dropout(x.to(A.dtype)), A)
        return self.vera_lambda_b * functional.linear(self.vera_lambda_d * inner, B)

    @torch.no_grad()
    def dense_update(self) -> torch.Tensor:
        """Return the update as (out_features, in_features), float32."""
        A, B = self._factors()
        with torch.autocast(A.device.type, enabled=False):
            return (self.vera_lambda_b[:, None] * B) @ (self.vera_lambda_d[:, None] * A)


def share_factors(model: nn.Module, layers: Sequence[AdapterLayer], settings: LoraSettings) -> None:
    """Put the random factors into a model, as large as the largest of its new layers needs.

    Does nothing where no layer is one of VeRA.
    """
    own: list[Any] = [layer for layer in layers if isinstance(layer, VeraLinear)]
    if not own:
        return
    columns, rows = settings.projection_sizes or (0, 0)
    sizes = (
        max(columns, *(layer.in_features for layer in own)),
        max(rows, *(layer.out_features for layer in own)),
    )
    factors = SharedFactors(
        r=settings.r, sizes=sizes, seed=settings.projection_seed, device=own[0].weight.device
    )
    model.add_module(SHARED_NAME, factors)
    for layer in own:
        layer.share(factors)
