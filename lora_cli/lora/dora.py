"""DoRA: the length of each row of a weight is trained apart from its direction.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from lora_cli.lora.conv import LoraConv
from lora_cli.lora.embedding import LoraEmbedding
from lora_cli.lora.kinds import dense_layer, dense_weight, is_conv1d
from lora_cli.lora.layer import TransparentLayer
from lora_cli.lora.linear import LoraLinear

# Elements of the weight that are widened at a time to take lengths: 16 MiB in float32.
_PIECE = 2**22


class _Magnitude(TransparentLayer):
    r"""What DoRA adds to a layer with a low-rank update: equation 5 of the paper.

    The weight becomes, output by output, with W the frozen weight and s the scale::

        W' = m * V / ||V||        V = W + s B A

    ``||V||`` counts as a constant in the backward pass (section 4.3), so its gradient never holds a
    matrix of the size of the weight. m starts at ``||W||``, and a new layer returns exactly what
    its base does. V is formed piece by piece to take its lengths, in float32 whatever the dtype of
    the base, and not kept.
    """

    lora_magnitude_vector: nn.Parameter
    scale: float

    @abstractmethod
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return W (out, in) in its own dtype, A (r, in) and B (out, r)."""

    @abstractmethod
    def as_stored(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a matrix (out, in) in the layout of the base weight."""

    @abstractmethod
    def plain_layer(self, weight: torch.Tensor) -> nn.Module:
        """Return a frozen layer like the base with another weight, given as (out, in)."""

    def lengths(self, *shape: int) -> nn.Parameter:
        """Return the start of m, in this shape."""
        return nn.Parameter(self.norms().to(torch.float32).reshape(shape))

    @torch.no_grad()
    def norms(self) -> torch.Tensor:
        """Return ``||V||`` for each output, shape (out,)."""
        W, A, B = self.matrices()
        wide = torch.promote_types(W.dtype, A.dtype)
        total = torch.zeros(W.shape[0], dtype=wide, device=W.device)
        if W.is_meta:  # no values, and autocast does not know the device
            return total
        width = max(1, _PIECE // W.shape[0])
        with torch.autocast(W.device.type, enabled=False):
            for w, a in zip(torch.split(W, width, 1), torch.split(A, width, 1), strict=True):
                v = torch.addmm(w.to(wide), B.to(wide), a.to(wide), alpha=self.scale)
                total += v.square_().sum(dim=1)
        return total.sqrt_()

    def factor(self) -> torch.Tensor:
        """Return ``m / ||V||`` for each output, shape (out,); 0 where V is zero."""
        norms = self.norms()
        return self.lora_magnitude_vector.flatten() / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    def rescale(
        self, result: torch.Tensor, update: torch.Tensor, *, shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Return the output from that of the base and the scaled update.

        Args:
            result: ``W x + b``.
            update: ``s B A drop(x)``.
            shape: Makes a vector over outputs fit both.
        """
        bias = self.base_layer.bias
        # The only activation of this size that the backward pass needs.
        product = result + (update if bias is None else update - bias.view(shape))
        change = (self.factor() - 1).view(shape)
        return (result + update + change * product).to(result.dtype)

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """Return ``W' - W`` in the layout of the base weight, float32."""
        W, _, _ = self.matrices()
        return self.as_stored((self._whole() - W).to(torch.float32))

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a plain frozen layer that computes the same function, dropout aside.

        W' is computed in float32 and rounded once to the dtype of the base weight. ``self`` is left
        as it was.
        """
        W, _, _ = self.matrices()
        return self.plain_layer(self._whole().to(W.dtype))

    def _whole(self) -> torch.Tensor:
        """Return W' as (out, in), float32 or wider."""
        W, A, B = self.matrices()
        wide = torch.promote_types(W.dtype, A.dtype)
        with torch.autocast(W.device.type, enabled=False):
            v = torch.addmm(W.to(wide), B.to(wide), A.to(wide), alpha=self.scale)
            return v.mul_(self.factor()[:, None])


class DoraLinear(_Magnitude, LoraLinear):
    r"""A `LoraLinear` whose rows have trained lengths.

    Computes, with b the bias of the base::

        y = m / ||V|| * (W x + s B A dropout(x)) + b        V = W + s B A

    Under dropout PEFT's output differs, and only there: it takes what m changes of the base from
    the dropped inputs as well, ``W x + (m / ||V|| - 1) W dropout(x) + m / ||V|| s B A dropout(x)``.
    The paper drops nothing out of the base, as here, and PEFT's way costs a second product with W.

    Takes the arguments of `LoraLinear` but `lora_bias`, and adds the parameter
    ``lora_magnitude_vector`` m, shape (out_features,), trained, float32. A start from the base
    weight (`start_from`) leaves m as it is, since V stays the same.

    Raises:
        ValueError: As `LoraLinear`, or if B is to have a bias, which no length could be given.
    """

    def __init__(self, base: nn.Linear, *, lora_bias: bool = False, **options: Any) -> None:
        _refuse_bias(lora_bias)
        super().__init__(base, **options)
        self.lora_magnitude_vector = self.lengths(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``m / ||V|| * (W x + s B A dropout(x)) + b`` in the dtype of ``base(x)``."""
        result: torch.Tensor = self.base_layer(x)
        return self.rescale(result, self.update(x) * self.scale, shape=(-1,))

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return W, A and B; where the update has a start to take away, that is part of A and B."""
        A, B, W = self.lora_A.weight, self.lora_B.weight, dense_weight(self.base_layer)
        if self.start_A is None or self.start_B is None:
            return W, A, B
        return W, torch.cat([A, self.start_A]), torch.cat([B, -self.start_B], dim=1)

    def as_stored(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a matrix (out, in) in the layout of the base weight."""
        return weight.T if is_conv1d(self.base_layer) else weight

    def plain_layer(self, weight: torch.Tensor) -> nn.Module:
        """Return a frozen layer like the base with another weight, given as (out, in)."""
        return dense_layer(self.base_layer, weight)


class DoraEmbedding(_Magnitude, LoraEmbedding):
    """A `LoraEmbedding` whose columns have trained lengths, as in PEFT.

    An output of an embedding is a column of its table, over all rows. Takes the arguments of
    `LoraEmbedding`, and adds ``lora_magnitude_vector``, shape (embedding_dim,), trained, float32.
    The lengths cost a pass over the whole table in every step.
    """

    def __init__(self, base: nn.Embedding, **options: Any) -> None:
        super().__init__(base, **options)
        self.lora_magnitude_vector = self.lengths(-1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the updated and rescaled rows with the numbers `ids`."""
        result: torch.Tensor = self.base_layer(ids)
        return (self.factor() * (result + self.update(ids) * self.scale)).to(result.dtype)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the transposed table, A and B."""
        return self.base_layer.weight.T, self.lora_embedding_A, self.lora_embedding_B

    def as_stored(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the transpose."""
        return weight.T.contiguous()

    def plain_layer(self, weight: torch.Tensor) -> nn.Module:
        """Return a frozen layer like the base with another weight, given as (out, in)."""
        return self.with_weight(self.as_stored(weight))


class DoraConv(_Magnitude, LoraConv):
    """A `LoraConv` whose filters have trained lengths, as in PEFT.

    Computes what `DoraLinear` does, each filter being a row of W, flattened. Takes the arguments of
    `LoraConv` but `lora_bias`, and adds ``lora_magnitude_vector``, shape (1, out_channels, 1, ...),
    trained, float32.

    Raises:
        ValueError: As `LoraConv`, or if the base has several groups: the update reaches across
            them, so it does not add to filters of the base, and has no common length with them.
    """

    def __init__(
        self,
        base: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        *,
        lora_bias: bool = False,
        **options: Any,
    ) -> None:
        _refuse_bias(lora_bias)
        if base.groups > 1:
            raise ValueError(
                f"With DoRA a convolution must have 1 group, since the update reaches across "
                f"groups, but this one has {base.groups}."
            )
        super().__init__(base, **options)
        self.lora_magnitude_vector = self.lengths(1, -1, *(1 for _ in base.kernel_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rescaled output in the dtype of ``base(x)``."""
        result: torch.Tensor = self.base_layer(x)
        shape = (-1, *(1 for _ in self.base_layer.kernel_size))
        return self.rescale(result, self.update(x) * self.scale, shape=shape)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return W, A and B, each flattened to a matrix."""
        tensors = self.base_layer.weight, self.lora_A.weight, self.lora_B.weight
        W, A, B = (tensor.flatten(1) for tensor in tensors)
        return W, A, B

    def as_stored(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a matrix (out, in) in the shape of the base weight."""
        return weight.reshape(self.base_layer.weight.shape)

    def plain_layer(self, weight: torch.Tensor) -> nn.Module:
        """Return a frozen layer like the base with another weight, given as (out, in)."""
        return self.with_weight(self.as_stored(weight))


def _refuse_bias(lora_bias: bool) -> None:
    if lora_bias:
        raise ValueError("With DoRA the update must be a matrix, but B is to have a bias.")
