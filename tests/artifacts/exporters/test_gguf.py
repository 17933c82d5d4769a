"""GGUF files in transformers and in the gguf package."""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tiny_llama import TEMPLATE, TEXTS, byte_tokenizer, random_llama

from lora_cli.artifacts.exporters import gguf as exporter
from lora_cli.artifacts.exporters.contract import Candidate, ExportInputs, Reading
from lora_cli.artifacts.exporters.gguf import (
    HASH_KEY,
    export_gguf,
    noise_of_gguf,
    read_gguf,
    why_no_gguf,
)
from lora_cli.errors import RunFailedError

READING = Reading(auto_class="AutoModelForCausalLM", load_base=lambda: torch.nn.Identity())
IDS = torch.randint(3, 400, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def inputs(tmp_path: Path) -> Any:
    def make(cut: str = "gpt-2", gguf_type: str = "auto", **settings: Any) -> ExportInputs:
        tokenizer = byte_tokenizer(cut)
        return ExportInputs(
            adapter_folder=tmp_path,
            model=random_llama(len(tokenizer) + 3, **settings),
            processor=tokenizer,
            labels=(),
            max_length=None,
            output=tmp_path / "model.gguf",
            gguf_type=gguf_type,
            name="tiny",
        )

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits.float()
    return found


def fact(path: Path, key: str) -> Any:
    return gguf.GGUFReader(str(path)).fields[key].contents()


@pytest.mark.parametrize(
    "settings",
    [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"head_dim": 32}],
    ids=["grouped", "tied", "ungrouped", "wide-heads"],
)
def test_transformers_computes_the_same(inputs: Any, settings: dict[str, Any]) -> None:
    given = inputs(**settings)
    export_gguf(given)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        given.output.parent, gguf_file=given.output.name, dtype=torch.float32
    )
    expected = logits(given.model)
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits(loaded.eval()), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        logits(read_gguf(given.output, READING)), expected, atol=1e-4, rtol=0
    )
    assert loaded.config.tie_word_embeddings == settings.get("tie_word_embeddings", False)
    assert loaded.config.vocab_size == given.model.config.vocab_size
    assert loaded.config.max_position_embeddings == 128


@pytest.mark.parametrize("cut", ["gpt-2", "llama-bpe"])
def test_transformers_cuts_texts_as_before(inputs: Any, cut: str) -> None:
    given = inputs(cut)
    export_gguf(given)
    read: Any = transformers.AutoTokenizer.from_pretrained(
        given.output.parent, gguf_file=given.output.name
    )
    for text in TEXTS:
        assert read(text)["input_ids"] == given.processor(text)["input_ids"], text
    assert read.chat_template == TEMPLATE
    assert (read.bos_token, read.eos_token) == ("<|begin|>", "<|end|>")


@pytest.mark.parametrize(
    ("gguf_type", "dtype", "bound"),
    [("bf16", torch.bfloat16, 0.5), ("f16", torch.float16, 0.05), ("q8_0", None, 0.6)],
)
def test_matrices_are_rounded_to_the_format_and_vectors_are_not(
    inputs: Any, gguf_type: str, dtype: torch.dtype | None, bound: float
) -> None:
    given = inputs(gguf_type=gguf_type)
    export_gguf(given)
    weights = given.model.state_dict()
    tensors = {t.name: t for t in gguf.GGUFReader(str(given.output)).tensors}
    norm, matrix = tensors["output_norm.weight"], tensors["blk.1.ffn_up.weight"]
    assert np.array_equal(norm.data, weights["model.norm.weight"].numpy())
    assert matrix.tensor_type.name == gguf_type.upper()
    found = torch.from_numpy(gguf.quants.dequantize(matrix.data, matrix.tensor_type))
    expected = weights["model.layers.1.mlp.up_proj.weight"]
    if dtype is not None:
        assert torch.equal(found, expected.to(dtype).float())
    else:
        assert 0.001 < (found - expected).abs().max() < 0.5 / 120 * expected.abs().max()
    farthest = float((logits(read_gguf(given.output, READING)) - logits(given.model)).abs().max())
    assert 1e-4 < farthest < bound
    noise = noise_of_gguf(given)
    assert noise is not None
    before = logits(given.model)
    with noise(given.model, torch.Generator().manual_seed(0)):
        moved = float((logits(given.model) - before).abs().max())
    assert 0.25 < farthest / moved < 4


def test_a_model_keeps_its_number_format_and_is_then_not_rounded(inputs: Any) -> None:
    given = inputs(dtype=torch.bfloat16)
    export_gguf(given)
    assert noise_of_gguf(given) is None
    assert fact(given.output, "general.file_type") == gguf.LlamaFileType.MOSTLY_BF16
    loaded = read_gguf(given.output, READING)
    for name, values in given.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], values.float()), name
    assert noise_of_gguf(inputs(gguf_type="f32")) is None
    assert noise_of_gguf(inputs(gguf_type="bf16")) is not None


def test_facts_of_the_file(inputs: Any) -> None:
    given = inputs("smollm")
    export_gguf(given)
    assert fact(given.output, "general.name") == "tiny"
    assert fact(given.output, "tokenizer.ggml.pre") == "smollm"
    assert fact(given.output, "llama.rope.freq_base") == 5000.0
    assert fact(given.output, "llama.attention.head_count_kv") == 2
    assert re.fullmatch("[0-9a-f]{64}", fact(given.output, HASH_KEY))
    assert str(Path.cwd()).encode() not in given.output.read_bytes()


def test_a_damaged_file_is_refused(inputs: Any) -> None:
    given = inputs()
    export_gguf(given)
    content = bytearray(given.output.read_bytes())
    content[-1000] ^= 1
    given.output.write_bytes(content)
    with pytest.raises(ValueError, match="was damaged"):
        read_gguf(given.output, READING)


def test_a_tokenizer_that_would_cut_otherwise_is_found(
    inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = exporter.read_vocabulary

    def wrong(tokenizer: Any, *, size: int) -> Any:
        import dataclasses

        return dataclasses.replace(read(tokenizer, size=size), adds_bos=True)

    monkeypatch.setattr(exporter, "read_vocabulary", wrong)
    with pytest.raises(RunFailedError, match="must cut texts"):
        export_gguf(inputs())


def candidate(model: Any, **changes: Any) -> Candidate:
    fields: dict[str, Any] = {
        "family": "causal_language_modeling",
        "auto_class": "AutoModelForCausalLM",
        "model": model,
        "processor": byte_tokenizer(),
        "adapter": None,
        **changes,
    }
    return Candidate(**fields)


@pytest.mark.parametrize(
    ("settings", "changes", "reason"),
    [
        ({}, {"auto_class": "AutoModelForSequenceClassification"}, "a head that llama.cpp"),
        ({"attention_bias": True}, {}, "have biases"),
        ({"hidden_act": "gelu"}, {}, "computes silu"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            {},
            "scales its rotary positions (linear)",
        ),
        ({"intermediate_size": 40}, {"gguf_type": "q8_0"}, "blocks of 32"),
    ],
)
def test_other_models_are_refused_with_the_reason(
    settings: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    refusal = why_no_gguf(candidate(random_llama(10, **settings), **changes))
    assert refusal is not None
    assert reason in refusal.reason
    assert refusal.fix.startswith("format=")


def test_other_families_and_tokenizers_are_refused() -> None:
    config = transformers.Qwen2Config(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=8,
    )  # fmt: skip
    refusal = why_no_gguf(candidate(transformers.Qwen2ForCausalLM(config)))
    assert refusal is not None
    assert "this is a qwen2" in refusal.reason
    refusal = why_no_gguf(candidate(random_llama(10), processor=object()))
    assert refusal is not None
    assert "tokenizers package" in refusal.reason
    assert why_no_gguf(candidate(random_llama(10), gguf_type="q8_0")) is None
