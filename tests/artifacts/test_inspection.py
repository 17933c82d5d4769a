"""Reading adapter folders without trust in them."""

import json
from pathlib import Path

import pytest
import torch
from peft.utils.other import get_pattern_key
from stranger_adapters import PREFIX, factors, look, write_adapter

from lora_cli.artifacts.inspection import lookup, parse_key


@pytest.mark.parametrize(
    ("name", "module", "leaf", "adapter"),
    [
        ("a.query.lora_A.weight", "a.query", "lora_A", ""),
        ("a.query.lora_B.default.weight", "a.query", "lora_B", "default"),
        ("a.query.lora_B.bias", "a.query", "lora_bias", ""),
        ("a.query.lora_A.bias", "a.query", "stray", ""),
        ("a.emb.lora_embedding_A", "a.emb", "lora_embedding_A", ""),
        ("a.emb.lora_embedding_B.default", "a.emb", "lora_embedding_B", "default"),
        ("a.emb.lora_embedding_A.weight", "a.emb", "stray", ""),
        ("a.q.lora_magnitude_vector", "a.q", "magnitude", ""),
        ("a.q.lora_magnitude_vector.weight", "a.q", "magnitude", ""),
        ("a.emb.token_adapter.trainable_tokens_delta", "a.emb", "tokens", ""),
        ("a.q.lora_down.weight", "a.q.lora_down.weight", "stray", ""),
        ("a.q.lora_A", "a.q.lora_A", "stray", ""),
        ("classifier.weight", "classifier.weight", "", ""),
        ("a.q.base_layer.bias", "a.q.base_layer.bias", "", ""),
    ],
)
def test_names_are_taken_apart(name: str, module: str, leaf: str, adapter: str) -> None:
    for text in (name, PREFIX + name):
        assert parse_key(text) == (text, module, leaf, adapter)


def test_patterns_are_those_of_peft_and_never_run_as_regular_expressions() -> None:
    patterns = {"layers.0.q_proj": 2, "v_proj": 3}
    for name in ("model.layers.0.q_proj", "layers.0.q_proj", "a.v_proj", "xv_proj", "k"):
        key = get_pattern_key(patterns, name)
        assert lookup(patterns, name, 7) == patterns.get(key, 7), name
    assert lookup({"(a+)+b": 2}, "aaaa", 7) is None
    assert lookup("q_proj", "q_proj", 7) == 7


def test_folder_is_read(tmp_path: Path) -> None:
    tensors = {**factors(), **factors("model.layers.1.self_attn.q_proj")}
    tensors[f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.weight"][0, 0] = torch.nan
    tensors[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight"].zero_()
    folder = write_adapter(tmp_path / "a", tensors, use_rslora=True, rank_pattern={"q_proj": 16})
    (folder / "lora_cli.json").write_text(json.dumps({"state": {"labels": ["no", "yes"]}}))
    found = look(folder)
    assert found.labels == ("no", "yes")
    assert [name.split(".")[4:6] for name in found.not_finite] == [["1", "self_attn"]]
    assert [name.split(".")[4:6] for name in found.zero] == [["0", "self_attn"]]
    assert found.rank_of("x.q_proj") == 16
    assert found.rank_of("x.v_proj") == 4
    assert found.scale_of("x.q_proj") == 2.0
    pair = found.pairs["model.layers.0.self_attn.q_proj"]
    assert pair.A is not None
    assert pair.A.shape == (4, 16)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"r": 1}' + " " * (2 << 20), "[" * 10_000])
def test_config_that_cannot_be_read_is_told(content: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_config.json").write_text(content)
    found = look(folder)
    assert found.config == {}
    assert found.config_fault


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      x", b"\xff" * 20])
def test_weights_that_cannot_be_read_are_told(content: bytes, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(content)
    found = look(folder)
    assert found.tensors == {}
    assert "damaged" in found.tensors_fault


def test_pickle_is_never_opened(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    found = look(folder)
    assert "adapter_model.bin" in found.files
    assert found.tensors == {}


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"state": 1}', '{"state": {"labels": 3}}'])
def test_record_that_is_none_has_no_labels(record: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "lora_cli.json").write_text(record)
    assert look(folder).labels == ()
