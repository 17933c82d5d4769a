"""Hashes of weight files against hashlib."""

import hashlib
import json
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from lora_cli.models.weights import hash_file, hash_weights, read_header, weight_files


def test_one_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"numbers")
    assert weight_files(tmp_path) == ("model.safetensors",)
    expected = hashlib.sha256(b"numbers").hexdigest()
    assert hash_weights(tmp_path) == hash_file(tmp_path / "model.safetensors") == expected


def test_several_files_in_order_of_name(tmp_path: Path) -> None:
    parts = {"b.safetensors": b"two", "a.safetensors": b"one"}
    for name, content in parts.items():
        (tmp_path / name).write_bytes(content)
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_files(tmp_path) == ("a.safetensors", "b.safetensors")
    lines = "".join(f"{name} {hashlib.sha256(parts[name]).hexdigest()}\n" for name in sorted(parts))
    assert hash_weights(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "model.bin", 3])
def test_index_that_leads_elsewhere(tmp_path: Path, name: object) -> None:
    index = {"weight_map": {"x": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not a plain file name"):
        weight_files(tmp_path)


DAMAGE = {
    "cut": lambda header, data: (header, data[:-1]),
    "longer": lambda header, data: (header, data + b"x"),
    "a list": lambda header, data: ([], data),
    "no shape": lambda header, data: ({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, data),
    "a number": lambda header, data: ({"w": 3}, data),
    "other bytes": lambda header, data: ({"w": {**header["w"], "shape": [3]}}, data),
    "a hole": lambda header, data: ({"w": {**header["w"], "data_offsets": [1, 9]}}, data + b"x"),
    "backwards": lambda header, data: ({"w": {**header["w"], "data_offsets": [8, 0]}}, data),
    "metadata": lambda header, data: ({**header, "__metadata__": {"a": 1}}, data),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_headers_that_safetensors_refuses(tmp_path: Path, damage: str) -> None:
    header, data = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)
    path = tmp_path / "x.safetensors"

    def write(header: object, data: bytes) -> None:
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)

    write(header, data)
    (entry,) = read_header(path)[1].values()
    assert (entry.kind, entry.shape, entry.end - entry.start) == ("F32", (2,), 8)
    write(*DAMAGE[damage](header, data))
    with pytest.raises(SafetensorError), safe_open(path, framework="np"):
        pass
    with pytest.raises(ValueError, match=r"w |its "):
        read_header(path)
