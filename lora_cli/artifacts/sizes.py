"""How large a file of tensors will be, before there are any numbers."""

import json
from collections.abc import Mapping

import torch

# In the order of the file.
_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def safetensors_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the size in bytes of the file that safetensors writes, with ``{"format": "pt"}``.

    Args:
        tensors: By name; they may be on the meta device.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place, order = 0, list(_NAMES)
    # The digits of the offsets depend on it.
    for name in sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name)):
        tensor = tensors[name]
        end = place + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    length = len(text.encode())
    # A count of eight bytes stands first, and blanks fill the header up to a multiple of eight.
    return 8 + length + -length % 8 + place
