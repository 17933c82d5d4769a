"""LoraEmbedding: any size, classes that scale, classes that are refused, real models."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextScaledWordEmbedding
from transformers.models.whisper.modeling_whisper import WhisperPositionalEmbedding

from lora_cli.lora.embedding import LoraEmbedding, unsupported
from lora_cli.lora.inject import inject_lora
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.settings import LoraSettings


def _sibling(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"embedding_{name}", Path(__file__).with_name(f"{name}.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


algebra, support = _sibling("algebra"), _sibling("layer_support")


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    size=st.integers(1, 7),
    r=st.integers(1, 9),
    alpha=st.floats(0.1, 32),
    padded=st.booleans(),
    by_frequency=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_tables_of_any_size_are_the_formula(
    rows: int, size: int, r: int, alpha: float, padded: bool, by_frequency: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    base = nn.Embedding(
        rows, size, padding_idx=rows - 1 if padded else None, scale_grad_by_freq=by_frequency
    )
    layer = LoraEmbedding(base, r=r, alpha=alpha)
    support.shake(layer)
    algebra.compare(layer, torch.randint(0, rows, (2, 3)), scale=alpha / r)


def test_start() -> None:
    torch.manual_seed(0)
    layer = LoraEmbedding(nn.Embedding(50, 400), r=8, alpha=4.0)
    assert not layer.lora_embedding_A.any()
    assert layer.lora_embedding_B.std().item() == pytest.approx(1, rel=0.03)
    assert layer.lora_embedding_B.mean().item() == pytest.approx(0, abs=0.05)


def test_the_row_of_the_padding_token_stays() -> None:
    layer = LoraEmbedding(nn.Embedding(6, 4, padding_idx=0), r=2, alpha=2.0)
    optimizer = torch.optim.AdamW(layer.trained_parameters(), lr=0.1)
    for _ in range(3):
        layer(torch.tensor([0, 1, 5])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    merged: Any = layer.merged()
    assert torch.equal(merged.weight[0], layer.base_layer.weight[0])
    assert not torch.equal(merged.weight[1], layer.base_layer.weight[1])
    assert merged.padding_idx == 0


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["embedding-gemma", "embedding-bart"])
def test_scaled_classes_on_a_low_precision_base(kind: str, variant: str) -> None:
    """The square root of 6 is not a bfloat16: Gemma rounds it, BART does not."""
    layer = support.adapt(support.CASES[kind], variant, dtype=torch.bfloat16)
    if "gemma" in kind:  # float32 there, whatever the dtype of the table
        layer.base_layer.embed_scale = torch.tensor(6**0.5)
    merged, ids = layer.merged(), support.CASES[kind].inputs()
    assert type(merged) is type(layer.base_layer)
    table = support.adapt(support.CASES[kind], variant, dtype=torch.bfloat16).double()
    factor = torch.tensor(6**0.5)
    factor = factor.bfloat16() if "gemma" in kind else factor
    exact = functional.embedding(ids, table.merged().weight) * factor.double()
    wanted = functional.embedding(ids, layer.delta_weight()) * factor.float()
    if variant == "lora":
        torch.testing.assert_close(layer.update(ids) * layer.scale, wanted, rtol=1e-5, atol=1e-6)
    # Within the rounding of the output and of the two terms in it.
    base = layer.base_layer(ids).abs()
    bound = torch.finfo(torch.bfloat16).eps * (exact.abs() + base.double())
    assert ((layer(ids).double() - exact).abs() <= bound).all()


def test_merged_table_is_new_and_the_old_one_is_not_copied() -> None:
    layer = support.adapt(support.CASES["embedding-gemma"], "lora")
    before = layer.base_layer.weight.clone()
    first, second = layer.merged(), layer.merged()
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(layer.base_layer.weight, before)
    assert first.weight.data_ptr() != layer.base_layer.weight.data_ptr()
    assert not first.weight.requires_grad
    assert first.weight.is_contiguous()
    assert first.embed_scale is not layer.base_layer.embed_scale
    assert first.embed_scale == layer.base_layer.embed_scale


REFUSED = {
    "positions by place": lambda: BartLearnedPositionalEmbedding(8, 4),
    "positions by length": lambda: WhisperPositionalEmbedding(8, 4),
    "fixed positions": lambda: MarianSinusoidalPositionalEmbedding(8, 4),
    "a row from elsewhere": lambda: T5Gemma2TextScaledWordEmbedding(8, 4, 0, embed_scale=2.0),
    "shortened rows": lambda: nn.Embedding(8, 4, max_norm=1.0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_classes_with_another_way_are_refused(name: str) -> None:
    base = REFUSED[name]()
    trained = base.weight.requires_grad
    with pytest.raises(ValueError, match="An embedding must look up rows of its own weight, but"):
        LoraEmbedding(base, r=1, alpha=1.0)
    assert base.weight.requires_grad == trained


def test_a_scale_of_several_numbers_is_refused() -> None:
    base: Any = Gemma3TextScaledWordEmbedding(8, 4, 0, embed_scale=2.0)
    assert unsupported(base) is None
    base.embed_scale = torch.ones(4)
    assert unsupported(base) is not None
    # Without effect where the class does not multiply.
    plain: Any = nn.Embedding(8, 4)
    plain.embed_scale = 3.0
    layer = LoraEmbedding(plain, r=2, alpha=2.0)
    support.shake(layer)
    ids = torch.tensor([1, 2])
    assert torch.allclose(layer(ids), layer.merged()(ids), atol=1e-6)


@pytest.mark.parametrize("r", [0, -1])
def test_rank_must_be_positive(r: int) -> None:
    with pytest.raises(ValueError, match="r must be"):
        LoraEmbedding(nn.Embedding(4, 4), r=r, alpha=1.0)


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3_text": ("embed_tokens", {"num_key_value_heads": 1, "head_dim": 8}),
    "bart": (
        "embed_tokens",
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "scale_embedding": True}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2},
    ),
    "t5": ("relative_attention_bias", {"d_model": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}),
    "bert": ("position_embeddings", {}),
}


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", MODELS)
def test_models_that_look_at_their_embeddings(name: str, variant: str) -> None:
    target, sizes = MODELS[name]
    common = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **common, **heads, **sizes)
    model = AutoModel.from_config(config).eval()
    names = [n for n, _ in model.named_modules() if n.rpartition(".")[2] == target]
    ids = torch.tensor([[5, 6, 7, 8]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if name in ("bart", "t5") else {})
    before = model(**inputs).last_hidden_state
    inject_lora(model, names, LoraSettings(r=2, alpha=4.0, variant=variant))
    assert torch.equal(model(**inputs).last_hidden_state, before)
    for n in names:
        support.shake(model.get_submodule(n))
    adapted = model(**inputs).last_hidden_state
    assert not torch.allclose(adapted, before, atol=1e-3)
    merge_lora(model)
    torch.testing.assert_close(model(**inputs).last_hidden_state, adapted, rtol=0, atol=1e-5)
