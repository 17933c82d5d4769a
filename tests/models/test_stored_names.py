"""What tensors of files are called in a model, against what transformers loads from such files."""

from importlib import import_module
from typing import Any

import pytest
import torch
import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter

from lora_cli.models.stored_names import UnknownNamesError, name_stored

SMALL = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
}


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def on_meta(kind: type, config: Any) -> Any:
    with torch.device("meta"):
        return kind(config)


def test_a_body_alone_gets_its_name() -> None:
    config = transformers.BertConfig(**SMALL)
    model = on_meta(transformers.BertForSequenceClassification, config)
    stored = shapes(on_meta(transformers.BertModel, config))
    found = name_stored(model, stored)
    assert found.plain == {name: f"bert.{name}" for name in stored}
    assert found.written == found.plain
    assert not found.converted


def test_a_head_that_the_model_lacks_is_left_out_and_old_names_stay() -> None:
    config = transformers.BertConfig(**SMALL)
    model = on_meta(transformers.BertForSequenceClassification, config)
    stored = shapes(on_meta(transformers.BertForMaskedLM, config))
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma"): shape for name, shape in stored.items()
    }
    found = name_stored(model, old)
    assert not any(name.startswith("cls.") for name in found.plain)
    name = "bert.embeddings.LayerNorm.gamma"
    assert found.plain[name] == "bert.embeddings.LayerNorm.weight"
    assert found.written[name] == name


def test_another_shape_is_another_tensor() -> None:
    config = transformers.BertConfig(**SMALL, num_labels=2)
    model = on_meta(transformers.BertForSequenceClassification, config)
    found = name_stored(model, {**shapes(model), "classifier.weight": (3, 8)})
    assert "classifier.weight" not in found.plain
    assert "classifier.bias" in found.plain


def test_experts_that_are_put_together_are_told() -> None:
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=2)
    model = on_meta(transformers.MixtralForCausalLM, config)
    start = "model.layers.0.block_sparse_moe"
    stored = {f"{start}.experts.{n}.w{k}.weight": (8, 8) for n in (0, 1) for k in (1, 2, 3)}
    stored |= {f"{start}.gate.weight": (2, 8)}
    found = name_stored(model, stored)
    assert set(found.converted) == {name for name in stored if "experts" in name}
    assert set(found.converted.values()) <= set(model.state_dict())
    assert found.written == {f"{start}.gate.weight": f"{start}.gate.weight"}


def test_a_release_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("transformers.conversion_mapping")
    monkeypatch.delattr(module, "get_model_conversion_mapping")
    config = transformers.BertConfig(**SMALL)
    with pytest.raises(UnknownNamesError, match="ImportError"):
        name_stored(on_meta(transformers.BertModel, config), {})


def test_no_matrix_is_changed_under_its_own_name() -> None:
    """`lora_cli.artifacts.merge_names` relies on that."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    converters = [
        transform
        for kind in CONFIG_MAPPING_NAMES
        for transform in get_checkpoint_conversion_mapping(kind) or ()
        if isinstance(transform, WeightConverter)
    ]
    assert len(converters) > 20
    for converter in converters:
        same = set(converter.source_patterns) & set(converter.target_patterns)
        assert all("experts" in pattern for pattern in same), converter
