"""A linear layer with a low-rank update (Hu et al. 2021, "LoRA", arXiv:2106.09685)."""

import math

import torch
from torch import nn


class LoraLinear(nn.Module):
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
    =====================  ===========================  =======  ========

    Args:
        base: The layer to adapt. It is kept, not copied, and frozen in place.
        r: Rank of the update. Adds ``r * (in_features + out_features)`` parameters.
        alpha: Strength of the update before division by ``r``: at a fixed ``alpha``,
            doubling ``r`` halves ``scale``.
        dropout: Chance of zeroing each input element on the adapter path, in training only.

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

    def __init__(self, base: nn.Linear, *, r: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"r must be at least 1, but is {r}.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), but is {dropout}.")
        device = base.weight.device
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, r, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(
            r, base.out_features, bias=False, device=device, dtype=torch.float32
        )
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.scale = alpha / r
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.train(base.training)

    # Some models look at the weight of a layer before they call it (T5: its dtype, for `wo`).
    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight, without the update."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias."""
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``base(x) + scale * B(A(dropout(x)))`` in the dtype of ``base(x)``."""
        result: torch.Tensor = self.base_layer(x)
        update = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        summed: torch.Tensor = result + update * self.scale
        return summed.to(result.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a plain frozen layer that computes the same function, dropout aside.

        The sum is taken in float32 (float64 on a float64 base) and rounded once to the dtype of
        the base weight. ``self`` is left as it was, so merging twice gives two equal layers rather
        than a doubled update.
        """
        base = self.base_layer
        with torch.autocast(base.weight.device.type, enabled=False):
            delta = (self.lora_B.weight @ self.lora_A.weight) * self.scale
            wide = torch.promote_types(base.weight.dtype, torch.float32)
            weight = (base.weight.to(wide) + delta).to(base.weight.dtype)
        layer = nn.Linear(
            base.in_features, base.out_features, bias=base.bias is not None, device="meta"
        )
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if base.bias is not None:
            layer.bias = nn.Parameter(base.bias.detach().clone(), requires_grad=False)
        return layer.train(self.training)
