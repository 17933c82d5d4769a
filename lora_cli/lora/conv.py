"""A convolution with a low-rank update (Hu et al. 2021, "LoRA", arXiv:2106.09685)."""

import copy
import math
from typing import Any

import torch
from torch import nn

from lora_cli.lora.kinds import add_in_float
from lora_cli.lora.layer import TransparentLayer
from lora_cli.lora.settings import scale_of

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_PLAIN: dict[int, type[Conv]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class LoraConv(TransparentLayer):
    r"""A frozen convolution in 1, 2 or 3 dimensions plus a trainable low-rank update.

    Computes ``y = base(x) + scale * B(A(dropout(x)))``, ``scale = alpha / r``, in the dtype of
    ``base(x)``. A is a convolution to r channels with the kernel, stride, padding and dilation of
    the base; B is one of kernel 1 from there to the output. So the update of the weight is a
    product of matrices, each of its sides flattened::

        dW = scale * B A        dW (out, in * kernel),  B (out, r),  A (r, in * kernel)

    A starts Kaiming-uniform and B at zero: a new layer returns exactly ``base(x)``. A is drawn from
    torch's global generator.

    With ``groups`` above 1 the base connects each group of outputs with one group of inputs, but A
    reads all inputs, and the r channels are shared out among the groups, as in PEFT. The update
    then reaches across groups, so the merged layer has one group and a weight of full size.

    Parameters, named as in adapter state after ``base_layer`` is left out:

    =====================  ==========================  =======  ========
    name                   shape                       trained  dtype
    =====================  ==========================  =======  ========
    ``base_layer.weight``  (out, in / groups, *kernel)  no       as given
    ``base_layer.bias``    (out,), if any              no       as given
    ``lora_A.weight``      (r, in, *kernel)            yes      float32
    ``lora_B.weight``      (out, r / groups, 1, ...)   yes      float32
    ``lora_B.bias``        (out,), if asked            yes      float32
    =====================  ==========================  =======  ========

    PEFT's A has neither the dilation nor the padding mode of the base. With the first its sum does
    not fit, and with the second its merged layer is another function than its adapter; here both
    are those of the base.

    Args:
        base: The convolution to adapt. It is kept, not copied, and frozen in place.
        r: Rank of the update.
        alpha: Strength of the update before division by ``r``.
        dropout: Chance of zeroing each input element on the adapter path, in training only.
        rslora: Divide ``alpha`` by ``sqrt(r)`` (arXiv:2312.03732).
        lora_bias: Give B a bias, which starts at zero.

    Raises:
        ValueError: If ``r`` is below 1 or cannot be shared out among the groups, ``dropout`` is
            outside [0, 1), the class computes something else than a convolution with its weight,
            or the weight is itself computed (weight normalisation).

    Example:
        >>> layer = LoraConv(nn.Conv2d(3, 8, kernel_size=4, stride=4), r=2, alpha=4.0)
        >>> layer(torch.ones(1, 3, 8, 8)).shape
        torch.Size([1, 8, 2, 2])
        >>> [(name, tuple(p.shape)) for name, p in layer.named_parameters() if p.requires_grad]
        [('lora_A.weight', (2, 3, 4, 4)), ('lora_B.weight', (8, 2, 1, 1))]
    """

    def __init__(
        self,
        base: Conv,
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
        fault = unsupported(base)
        if fault:
            raise ValueError(f"A convolution must be one with its own weight, but {fault}.")
        if r % base.groups:
            raise ValueError(
                f"The rank must be a multiple of the {base.groups} groups of the convolution, "
                f"which share it, but is {r}."
            )
        kind: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        plain = _PLAIN[base.weight.ndim]
        self.base_layer = base.requires_grad_(False)
        self.lora_A = plain(base.in_channels, r, **_geometry(base), bias=False, **kind)
        self.lora_B = plain(r, base.out_channels, 1, groups=base.groups, bias=lora_bias, **kind)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.scale = scale_of(r, alpha, rslora=rslora)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        if self.lora_B.bias is not None:
            nn.init.zeros_(self.lora_B.bias)
        self.train(base.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``base(x) + scale * B(A(dropout(x)))`` in the dtype of ``base(x)``."""
        result: torch.Tensor = self.base_layer(x)
        return (result + self.update(x) * self.scale).to(result.dtype)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``B(A(dropout(x)))``."""
        update: torch.Tensor = self.lora_B(
            self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))
        )
        return update

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """Return the update, (out, in, *kernel), float32; with groups, that of the merged layer."""
        A, B, groups = self.lora_A.weight, self.lora_B.weight, self.base_layer.groups
        parts = B.reshape(groups, B.shape[0] // groups, -1), A.reshape(groups, -1, A[0].numel())
        with torch.autocast(A.device.type, enabled=False):
            return ((parts[0] @ parts[1]) * self.scale).reshape(B.shape[0], *A.shape[1:])

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a plain frozen convolution that computes the same function, dropout aside.

        The sum is taken in float32 and rounded once to the dtype of the base weight. ``self`` is
        left as it was. A base of several groups becomes a convolution of one group.
        """
        return self.with_weight(add_in_float(self._ungrouped(), self.delta_weight()))

    def with_weight(self, weight: torch.Tensor) -> nn.Module:
        """Return a frozen layer like the base with another weight, and the bias of B added."""
        base: Conv = self.base_layer
        bias: torch.Tensor | None = base.bias
        if self.lora_B.bias is not None:
            extra = self.lora_B.bias.detach() * self.scale
            old = torch.zeros_like(extra, dtype=weight.dtype) if bias is None else bias
            bias = add_in_float(old, extra)
        memo = {id(base.weight): nn.Parameter(weight, requires_grad=False)}
        # The memo holds tensors that are copied already, so the old weight is not.
        plain = copy.deepcopy(base, memo)
        plain.bias = None if bias is None else nn.Parameter(bias.detach().clone(), False)
        plain.groups = 1 if weight.shape[1] == base.in_channels else base.groups
        return plain

    def _ungrouped(self) -> torch.Tensor:
        """Return the base weight as that of a convolution of one group, (out, in, *kernel)."""
        weight: torch.Tensor = self.base_layer.weight
        groups: int = self.base_layer.groups
        if groups == 1:
            return weight
        out, fan_in = weight.shape[0] // groups, weight.shape[1]
        whole = weight.new_zeros(weight.shape[0], groups * fan_in, *weight.shape[2:])
        for group in range(groups):
            rows = slice(group * out, (group + 1) * out)
            whole[rows, group * fan_in : (group + 1) * fan_in] = weight[rows]
        return whole


def unsupported(base: Conv) -> str | None:
    """Return what a convolution does that an update of its weight does not follow, if anything."""
    plain = _PLAIN.get(base.weight.ndim)
    own = {name for name, _ in base.named_parameters()}
    if "weight" not in own or not own <= {"weight", "bias"}:
        return f"that is computed from {', '.join(sorted(own - {'bias'}))}"
    if plain is None or type(base).forward is not plain.forward:
        return f"{type(base).__name__} has a way of its own"
    return None


def _geometry(base: Conv) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    return {name: getattr(base, name) for name in names}
