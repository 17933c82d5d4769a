"""What every adapted layer has in common."""

from abc import abstractmethod
from typing import Any

import torch
from torch import nn


class AdapterLayer(nn.Module):
    """A frozen layer with something trained beside it.

    The frozen layer is `base_layer`. Every other parameter and persistent buffer is part of the
    adapter, and is named as in PEFT's files: ``lora_A.weight``, ``lora_magnitude_vector``, ... A
    layer computes and keeps no modes: merging gives a new layer, and leaves this one as it was.
    """

    base_layer: Any  # of many kinds, whose attributes differ

    def own_tensors(self) -> dict[str, torch.Tensor]:
        """Return what an adapter file holds of this layer: live tensors by name within it."""
        state: dict[str, torch.Tensor] = self.state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if not name.startswith("base_layer.")}

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer updates."""
        return [value for value in self.own_tensors().values() if isinstance(value, nn.Parameter)]

    @abstractmethod
    def delta_weight(self) -> torch.Tensor:
        """Return what merging adds to the base weight: its shape, float32, without gradient."""

    @abstractmethod
    def merged(self) -> nn.Module:
        """Return a plain frozen layer that computes the same function, dropout aside."""


class SharedTensors(nn.Module):
    """Frozen tensors that several adapted layers share; its persistent buffers are saved once.

    It is registered in the model, so that it moves with it, and merging takes it out again.
    """


class TransparentLayer(AdapterLayer):
    """An adapted layer that shows the attributes of its base where it has none of that name.

    Models look at layers before they call them: at the dtype of a weight (T5), at the number of
    rows of an embedding, at the stride of a convolution (wav2vec2).
    """

    def __getattr__(self, name: str) -> Any:
        """Return what this layer lacks from its base; a weight is the frozen one."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None:
                raise
            return getattr(base, name)
