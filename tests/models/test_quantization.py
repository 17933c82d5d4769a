"""Which layers of a model are quantized, and what is left of its function."""

import importlib.util
import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from lora_cli.errors import UserError
from lora_cli.models import quantization
from lora_cli.models.quantization import check_quantization, quantize_base

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

SIZES = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 2,
    "d_model": 64,
    "d_ff": 96,
    "d_kv": 16,
    "num_layers": 2,
    "num_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "num_labels": 3,
}


def tiny(family: str) -> Any:
    config = AutoConfig.for_model(family, **SIZES)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


def kinds(model: nn.Module) -> dict[str, str]:
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
    }


@pytest.mark.parametrize(("kind", "cls"), [("int8", "Linear8bitLt"), ("nf4", "Linear4bit")])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_quantizes_the_body_and_little_changes(family: str, kind: str, cls: str) -> None:
    model = tiny(family)
    ids = torch.tensor([[5, 9, 11, 30, 2], [7, 7, 40, 8, 2]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
    linear = kinds(model)
    whole = {"bert": ["bert.pooler", "classifier"], "gpt2": ["score"], "llama": ["score"]}.get(
        family, ["classification_head"]
    )
    found = quantize_base(model, kind, keep=("bert.pooler",))
    kept = {
        name
        for name in linear
        if any(name.startswith(head) for head in whole) or name.endswith(".wo")
    }
    assert {name for name, found in kinds(model).items() if found == cls} == linear.keys() - kept
    assert kept
    assert found.layers == len(linear) - len(kept)
    share = found.bytes_after / found.bytes_before
    assert share < (0.27 if kind == "int8" else 0.15)
    with torch.no_grad():
        after = model(input_ids=ids).logits
    change = (after - before).abs().max()
    assert 0 < change <= (0.05 if kind == "int8" else 0.3) * before.abs().max()
    assert not any(
        value.requires_grad for name, value in model.named_parameters() if name in linear
    )


def test_tied_weights_and_modules_that_are_trained_stay() -> None:
    model = tiny("bert")
    model.bert.encoder.layer[0].attention.self.key.weight = model.classifier.weight
    model.bert.encoder.layer[0].attention.self.value.weight = model.classifier.weight
    quantize_base(model, "nf4", keep=("bert.encoder.layer.1", "bert.pooler"))
    names = [name for name, found in kinds(model).items() if found == "Linear4bit"]
    assert "bert.encoder.layer.0.attention.self.query" in names
    assert "bert.encoder.layer.0.attention.self.key" not in names
    assert all(name.startswith("bert.encoder.layer.0.") for name in names)


def test_biases_and_mode_are_kept() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 4, bias=False)).train()
    bias = model[0].bias
    quantize_base(model, "int8", keep=())
    assert model[0].bias is bias
    assert model[1].bias is None
    assert model[0].training


def test_nothing_to_quantize_is_an_error() -> None:
    model = nn.Sequential(nn.Embedding(4, 4))
    with pytest.raises(
        UserError, match="must be none for a model whose body has no linear"
    ) as info:
        quantize_base(model, "nf4", keep=())
    assert info.value.problems[0].key == "model.quantization"


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        quantization, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    check_quantization("none")
    with pytest.raises(UserError, match="where bitsandbytes is not installed, but is nf4") as info:
        check_quantization("nf4")
    assert info.value.problems[0].fix == 'pip install "lora-cli[quantization]"'
    with pytest.raises(UserError, match="bitsandbytes is not installed"):
        quantize_base(nn.Sequential(nn.Linear(2, 2)), "int8", keep=())
