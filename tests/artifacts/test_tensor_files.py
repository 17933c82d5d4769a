"""Headers and tensors of safetensors files, against safetensors itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from lora_cli.artifacts.tensor_files import header_bytes, read_header, read_tensor, read_weights

TENSORS = {
    "b": torch.randn(3, 4).bfloat16(),
    "a": torch.randn(5),
    "ids": torch.arange(6),
    "none": torch.zeros(0, 4),
    "one": torch.tensor(2.5),
}


def test_a_file_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt", "x": "y"})
    weights = read_weights(tmp_path)
    assert weights.metadata["model.safetensors"] == {"format": "pt", "x": "y"}
    assert weights.num_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    starts = [tensor.start for tensor in weights.tensors.values()]
    assert starts == sorted(starts)
    for name, expected in load_file(tmp_path / "model.safetensors").items():
        stored = weights.tensors[name]
        assert stored.shape == tuple(expected.shape)
        if stored.dtype is None:
            assert name == "ids"
        else:
            assert torch.equal(read_tensor(stored), expected)
            assert stored.dtype == expected.dtype


def test_a_header_that_we_write_is_read(tmp_path: Path) -> None:
    entries = [("x", "F32", (2, 2), 16), ("é", "BF16", (3,), 6)]
    content = header_bytes(entries, {"format": "pt"}) + bytes(22)
    found = load(content)
    assert {name: tuple(t.shape) for name, t in found.items()} == {"x": (2, 2), "é": (3,)}
    assert len(header_bytes(entries, {})) % 8 == 0


def test_several_files(tmp_path: Path) -> None:
    names = ["model-1.safetensors", "model-2.safetensors"]
    for name, key in zip(names, ("a", "b"), strict=True):
        save_file({key: TENSORS[key]}, tmp_path / name)
    index = {"metadata": {"total_size": 44}, "weight_map": dict(zip("ab", names, strict=True))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = read_weights(tmp_path)
    assert list(weights.tensors) == ["a", "b"]
    assert weights.index == {"total_size": 44}
    assert weights.main_dtype == torch.bfloat16
    save_file({"a": TENSORS["a"]}, tmp_path / names[1])
    with pytest.raises(ValueError, match="a is in"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}, "36 bytes, and 8"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}, "other bytes"),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, entry: dict[str, object], why: str) -> None:
    text = json.dumps({"x": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=why):
        read_header(path)
    path.write_bytes((10**9).to_bytes(8, "little"))
    with pytest.raises(ValueError, match="header is"):
        read_header(path)
