"""Hashes of weight files against hashlib."""

import hashlib
import json
from pathlib import Path

import pytest

from lora_cli.models.weights import hash_file, hash_weights, weight_files


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
