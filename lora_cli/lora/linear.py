"""A linear layer with a low-rank update (Hu et al. 2021, "LoRA", arXiv:2106.09685)."""

import math

import torch
from torch import nn

from lora_cli.lora.kinds import (
    add_in_float,
    dense_layer,
    dense_weight,
    is_conv1d,
    linear_sizes,
)
from lora_cli.lora.layer import TransparentLayer
from lora_cli.lora.settings import scale_of


class LoraLinear(TransparentLayer):
    r"""A frozen linear layer plus a trainable low-rank update.

    Computes, for an input ``x`` of shape ``(..., in_features)``::

        y = base(x) + scale * B(A(dropout(x)))        scale = alpha / r

    and returns ``y`` of shape ``(..., out_features)``, in the dtype of ``base(x)``. A starts
    Kaiming-uniform and B starts at zero, so a new layer returns exactly ``base(x)``. A is drawn
    from torch's global generator: whoever builds the layers seeds it.

    The update is section 4.1 of the paper, which starts A from a Gaussian; the authors' code, PEFT
    and this layer do not.

    Parameters, named as in adapter state after ``base_layer`` is left out:

    =====================  ===========================  =======  ========
    name                   shape                        trained  dtype
    =====================  ===========================  =======  ========
    ``base_layer.weight``  (out_features, in_features)  no       as given
    ``base_layer.bias``    (out_features,), if any      no       as given
    ``lora_A.weight``      (r, in_features)             yes      float32
    ``lora_B.weight``      (out_features, r)            yes      float32
    ``lora_B.bias``        (out_features,), if asked    yes      float32
    ``start_A``            (r, in_features), if set     no       float32
    ``start_B``            (out_features, r), if set    no       float32
    =====================  ===========================  =======  ========

    Args:
        base: The layer to adapt: `nn.Linear`, transformers' Conv1D (whose weight is stored as
            (in_features, out_features)), or a quantized one. It is kept, not copied, and frozen in
            place.
        r: Rank of the update. Adds ``r * (in_features + out_features)`` parameters.
        alpha: Strength of the update before division by ``r``: at a fixed ``alpha``,
            doubling ``r`` halves ``scale``.
        dropout: Chance of zeroing each input element on the adapter path, in training only.
        rslora: Divide ``alpha`` by ``sqrt(r)`` (arXiv:2312.03732).
        lora_bias: Give B a bias, which starts at zero.

    Raises:
        ValueError: If ``r`` is below 1, or ``dropout`` is outside [0, 1).

    Example:
        >>> base = nn.Linear(64, 32)
        >>> layer = LoraLinear(base, r=4, alpha=8.0)
        >>> x = torch.ones(2, 5, 64)
        >>> layer(x).shape
        torch.Size([2, 5, 32])
        >>> torch.equal(layer(x), base(x))
        True
        >>> [(name, tuple(p.shape)) for name, p in layer.named_parameters() if p.requires_grad]
        [('lora_A.weight', (4, 64)), ('lora_B.weight', (32, 4))]
    """

    start_A: torch.Tensor | None  # noqa: N815, as the paper writes them
    start_B: torch.Tensor | None  # noqa: N815

    def __init__(
        self,
        base: nn.Linear,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        lora_bias: bool = False,
    ) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"r must be at least 1, but is {r}.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), but is {dropout}.")
        in_features, out_features = linear_sizes(base)
        kind = {"device": base.weight.device, "dtype": torch.float32}
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(in_features, r, bias=False, **kind)
        self.lora_B = nn.Linear(r, out_features, bias=lora_bias, **kind)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.scale = scale_of(r, alpha, rslora=rslora)
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        if lora_bias:
            nn.init.zeros_(self.lora_B.bias)
        self.train(base.training)

    # Some models look at the weight of a layer before they call it (T5: its dtype, for `wo`).
    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight, without the update."""
        weight: torch.Tensor = self.base_layer.weight
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias."""
        bias: torch.Tensor | None = self.base_layer.bias
        return bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``base(x) + scale * B(A(dropout(x)))`` in the dtype of ``base(x)``."""
        result: torch.Tensor = self.base_layer(x)
        return (result + self.update(x) * self.scale).to(result.dtype)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``B(A(dropout(x)))``, less what a start from the base weight takes away."""
        x = x.to(self.lora_A.weight.dtype)
        update: torch.Tensor = self.lora_B(self.lora_A(self.dropout(x)))
        if self.start_A is None or self.start_B is None:
            return update
        return update - x @ self.start_A.T @ self.start_B.T

    @torch.no_grad()
    def start_from(self, A: torch.Tensor, B: torch.Tensor) -> None:
        """Start the factors elsewhere than at zero, the function of the layer staying the same.

        The update becomes ``scale * (B A - B0 A0)``, with A0 and B0 the values given here: the base
        weight is left alone, where the papers subtract ``scale * B0 A0`` from it.

        Args:
            A: Start of A, shape (r, in_features).
            B: Start of B, shape (out_features, r).
        """
        self.lora_A.weight.copy_(A)
        self.lora_B.weight.copy_(B)
        self.start_A = self.lora_A.weight.detach().clone()
        self.start_B = self.lora_B.weight.detach().clone()

    @torch.no_grad()
    def dense_update(self) -> torch.Tensor:
        """Return the update as (out_features, in_features), float32."""
        with torch.autocast(self.lora_A.weight.device.type, enabled=False):
            product = self.lora_B.weight @ self.lora_A.weight
            if self.start_A is not None and self.start_B is not None:
                product -= self.start_B @ self.start_A
            return product * self.scale

    def delta_weight(self) -> torch.Tensor:
        """Return the update in the layout of the base weight, float32."""
        delta = self.dense_update()
        return delta.T if is_conv1d(self.base_layer) else delta

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a plain frozen layer that computes the same function, dropout aside.

        The sum is taken in float32 (float64 on a float64 base) and rounded once to the dtype of
        the base weight. ``self`` is left as it was, so merging twice gives two equal layers rather
        than a doubled update.
        """
        weight = add_in_float(dense_weight(self.base_layer), self.dense_update())
        # `nn.Linear` says that there always is a bias.
        bias: torch.Tensor | None = self.lora_B.bias
        return dense_layer(
            self.base_layer, weight, extra_bias=None if bias is None else bias * self.scale
        )
