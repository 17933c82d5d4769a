"""What linear layers share whose update is a matrix that a formula gives."""

from abc import abstractmethod

import torch
from torch import nn

from lora_cli.lora.kinds import add_in_float, dense_layer, dense_weight, is_conv1d
from lora_cli.lora.layer import TransparentLayer


class DenseUpdateLayer(TransparentLayer):
    """A frozen linear layer plus an update; a subclass says what the update is."""

    @abstractmethod
    def update(self, x: torch.Tensor) -> torch.Tensor:
        """Return what is added to ``base(x)``, float32."""

    @abstractmethod
    def dense_update(self) -> torch.Tensor:
        """Return the update as (out_features, in_features), float32, without gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``base(x)`` plus the update, in the dtype of ``base(x)``."""
        result: torch.Tensor = self.base_layer(x)
        return (result + self.update(x)).to(result.dtype)

    def delta_weight(self) -> torch.Tensor:
        """Return the update in the layout of the base weight, float32."""
        delta = self.dense_update()
        return delta.T if is_conv1d(self.base_layer) else delta

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a plain frozen layer that computes the same function, dropout aside.

        The sum is taken in float32 (float64 on a float64 base) and rounded once to the dtype of
        the base weight. ``self`` is left as it was.
        """
        weight = add_in_float(dense_weight(self.base_layer), self.dense_update())
        return dense_layer(self.base_layer, weight)
