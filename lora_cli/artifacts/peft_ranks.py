"""AdaLoRA's ranks in a file, which holds only those that are alive, with a mask that says which.

In memory every layer keeps its first rank, and what has been taken away is zero.
"""

from collections.abc import Mapping

import torch

_E = "lora_E"
_SLICES = {"lora_A": 0, "lora_B": 1, _E: 0}


def narrow(
    state: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, list[bool]] | None]:
    """Leave out the ranks whose entry of E is zero.

    Args:
        state: Tensors by the names of `lora_cli.lora.state.adapter_state`.

    Returns:
        The tensors, and for the name of each E its mask; the tensors as they are and None where
        every rank of every layer is alive, or none is, since nothing has been trained yet.
    """
    masks = {name: tensor.flatten() != 0 for name, tensor in state.items() if _leaf(name) == _E}
    alive = sum(int(mask.sum()) for mask in masks.values())
    if alive in (0, sum(len(mask) for mask in masks.values())):
        return dict(state), None
    narrowed = dict(state)
    for name, mask in masks.items():
        for leaf, axis in _SLICES.items():
            key = _sibling(name, leaf)
            kept = mask.nonzero().flatten()
            narrowed[key] = state[key].index_select(axis, kept).contiguous()
    return narrowed, {name: mask.tolist() for name, mask in masks.items()}


def widen(
    state: Mapping[str, torch.Tensor], masks: Mapping[str, list[bool]] | None
) -> dict[str, torch.Tensor]:
    """Undo `narrow`: put zeros where a rank was left out.

    A tensor that does not fit its mask is left as it is; its rank will then be seen to be wrong.

    Args:
        state: Tensors as a file holds them, without PEFT's prefix.
        masks: By the name of each E, with or without PEFT's name of the adapter at its end.
    """
    widened = dict(state)
    for name, mask in (masks or {}).items():
        rows = torch.tensor(mask, dtype=torch.bool).nonzero().flatten()
        for leaf, axis in _SLICES.items():
            key = _sibling(name.removesuffix(".default"), leaf)
            tensor = state.get(key)
            if tensor is None or tensor.ndim != 2 or tensor.shape[axis] != len(rows):
                continue
            shape = list(tensor.shape)
            shape[axis] = len(mask)
            widened[key] = tensor.new_zeros(shape).index_copy(axis, rows, tensor)
    return widened


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _sibling(name: str, leaf: str) -> str:
    return f"{name.rpartition('.')[0]}.{leaf}"
