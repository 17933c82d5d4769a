"""The hash at the end of an ONNX file: onnx reads it, and no changed byte passes."""

import hashlib
from pathlib import Path

import pytest

from lora_cli.artifacts.seal import find_damage, seal


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )
    document = onnx.helper.make_model(graph)
    document.metadata_props.add(key="labels", value="[]")
    path = tmp_path / "model.onnx"
    onnx.save(document, path)
    return path


@pytest.mark.parametrize("has_data", [False, True])
def test_it_is_metadata_like_any_other(model: Path, has_data: bool) -> None:
    import onnx

    plain, data = model.read_bytes(), model.with_name("model.onnx.data")
    if has_data:
        data.write_bytes(b"weights")
    seal(model)
    assert model.read_bytes().startswith(plain)
    document = onnx.load(model, load_external_data=False)
    onnx.checker.check_model(document)
    found = {entry.key: entry.value for entry in document.metadata_props}
    head = model.read_bytes()[: -len(found["sha256"]) - 12]
    assert found["sha256"] == hashlib.sha256(head).hexdigest()
    assert found["labels"] == "[]"
    if has_data:
        assert found["data_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert find_damage(model) is None


def test_no_changed_byte_passes(model: Path) -> None:
    assert "not the hash of the rest" in str(find_damage(model))
    seal(model)
    whole = model.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 4
        model.write_bytes(changed)
        assert find_damage(model), place
    for content in (b"", whole[:1], whole[: len(whole) // 2], whole[:-1], whole + b"\0"):
        model.write_bytes(content)
        assert find_damage(model)


def test_weights_beside_it_count(model: Path) -> None:
    data = model.with_name("model.onnx.data")
    # What lies beside a model of one file is none of its business.
    seal(model)
    data.write_bytes(b"weights")
    assert find_damage(model) is None
    seal(model)
    assert find_damage(model) is None
    data.write_bytes(b"Weights")
    assert find_damage(model) == "model.onnx.data does not match its sha256"
    data.unlink()
    assert find_damage(model) == "model.onnx.data is missing"
