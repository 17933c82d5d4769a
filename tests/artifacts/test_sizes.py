import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.artifacts.sizes import safetensors_bytes

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@given(
    st.dictionaries(
        st.text("abyzAZ019._-\u00e9\u4e2d", min_size=1, max_size=60),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 40), max_size=3)),
        max_size=8,
    )
)
def test_size_is_that_of_the_file(
    layout: dict[str, tuple[torch.dtype, list[int]]],
) -> None:
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in layout.items()}
    written = len(safetensors.torch.save(tensors, {"format": "pt"}))
    assert safetensors_bytes(tensors) == written
    assert safetensors_bytes({name: value.to("meta") for name, value in tensors.items()}) == written


def test_a_format_that_no_adapter_has_is_an_error() -> None:
    with pytest.raises(ValueError, match="complex64"):
        safetensors_bytes({"a": torch.zeros(1, dtype=torch.complex64)})
