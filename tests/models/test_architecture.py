import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_image_chat import write_tiny_image_chat
from transformers import BertConfig, BertForSequenceClassification, BertModel

from lora_cli.errors import UserError
from lora_cli.models.architecture import Architecture, load_architecture, resolve_config
from lora_cli.models.base import load_base
from lora_cli.models.sources import resolve_model

HEAD = "AutoModelForSequenceClassification"
CONFIG = BertConfig(
    vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
)


def lay_out(path: str | Path, *, auto_class: str = HEAD, num_labels: int = 2) -> Architecture:
    return load_architecture(
        resolve_config(str(path)), auto_class=auto_class, options={"num_labels": num_labels}
    )


@pytest.mark.parametrize("pooler", [True, False])
@pytest.mark.parametrize("num_labels", [2, 3])
@pytest.mark.parametrize("stored", ["body", "head"])
@pytest.mark.parametrize("shards", ["5GB", "2KB"])
def test_new_parameters_are_those_that_loading_finds(
    tmp_path: Path, pooler: bool, num_labels: int, stored: str, shards: str
) -> None:
    torch.manual_seed(0)
    if stored == "head":
        model = BertForSequenceClassification(CONFIG)
        if not pooler:
            model.bert.pooler = None
    else:
        model = BertModel(CONFIG, add_pooling_layer=pooler)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    found = lay_out(tmp_path, num_labels=num_labels)
    loaded = load_base(
        resolve_model(str(tmp_path), processor=None),
        auto_class=HEAD,
        options={"num_labels": num_labels},
        dtype="float32",
        seed=0,
    )
    assert found.new_keys == loaded.new_keys
    assert found.knows_weights
    assert found.has_head
    assert {n: p.shape for n, p in found.model.named_parameters()} == {
        n: p.shape for n, p in loaded.model.named_parameters()
    }
    assert {parameter.device.type for parameter in found.model.parameters()} == {"meta"}


def test_config_alone_is_enough(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    shutil.copy(tiny_model_dir() / "config.json", tmp_path)
    found = lay_out(tmp_path)
    assert found.new_keys == ("classifier.bias", "classifier.weight")
    assert not found.knows_weights


def test_damaged_weights_are_as_none(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    shutil.copy(tiny_model_dir() / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    assert not lay_out(tmp_path).knows_weights


def test_no_head_of_that_kind_leaves_the_body(tmp_path: Path) -> None:
    config = {"model_type": "vit", "hidden_size": 12, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = lay_out(tmp_path)
    assert not found.has_head
    assert type(found.model).__name__ == "ViTModel"
    assert found.new_keys == ()


def test_a_cached_hub_model_needs_config_json_only(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--somebody--tiny"
    snapshot = cache / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    shutil.copy(tiny_model_dir() / "config.json", snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = resolve_config("somebody/tiny")
    assert source.folder == snapshot
    assert lay_out("somebody/tiny").model.config.hidden_size == 32


def test_hub_without_network_is_the_usual_error() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(UserError, match="hub cannot be reached") as caught:
        resolve_config("somebody/missing")
    assert caught.value.problems[0].id == "model.hub-unreachable"


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ('{"model_type": "bert", "auto_map": {"AutoModel": "x.Y"}}', "model.asks-for-code"),
        ('{"model_type": "no_such_type"}', "model.bad-config"),
        ('{"model_type": "bert", "hidden_size": 7}', "model.does-not-load"),
        ("[]", "model.bad-config"),
        (None, "model.no-config"),
    ],
)
def test_what_is_no_model(tmp_path: Path, config: str | None, problem: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError) as caught:
        lay_out(tmp_path)
    assert [found.id for found in caught.value.problems] == [problem]


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "idefics3"])
def test_weights_under_the_names_that_parts_once_had_are_known(kind: str, tmp_path: Path) -> None:
    write_tiny_image_chat(tmp_path, kind)
    auto = "AutoModelForImageTextToText"
    source = resolve_model(str(tmp_path), processor="image chat processor")
    loaded = load_base(source, auto_class=auto, options={}, dtype="float32", seed=0)
    assert lay_out(tmp_path, auto_class=auto).new_keys == loaded.new_keys == ()
