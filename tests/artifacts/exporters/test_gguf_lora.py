"""Adapters of llama.cpp: their tensors, multiplied as llama.cpp does, against peft's merge."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
from tiny_llama import random_llama

from lora_cli.artifacts.exporters.contract import Candidate, ExportInputs, Reading
from lora_cli.artifacts.exporters.gguf_lora import (
    export_gguf_lora,
    read_gguf_lora,
    why_no_gguf_lora,
)
from lora_cli.artifacts.peft_format import load_peft

IDS = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(1))
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj", "lm_head"]


def trained(folder: Path, **settings: Any) -> Any:
    """Write an adapter by peft that says something, and return the model with it."""
    config = peft.LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 12,
            "target_modules": TARGETS,
            "task_type": "CAUSAL_LM",
            **settings,
        }
    )
    model: Any = peft.get_peft_model(random_llama(100), config)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def inputs(folder: Path, model: Any) -> ExportInputs:
    return ExportInputs(
        adapter_folder=folder,
        model=model,
        processor=None,
        labels=(),
        max_length=None,
        output=folder / "adapter.gguf",
        name="tiny",
        adapter=load_peft(folder),
    )


def candidate(adapter: Any, **changes: Any) -> Candidate:
    fields: dict[str, Any] = {
        "family": "chat",
        "auto_class": "AutoModelForCausalLM",
        "model": random_llama(10),
        "processor": None,
        "adapter": adapter,
        **changes,
    }
    return Candidate(**fields)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_llama_cpps_product_is_the_merge_of_peft(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = trained(tmp_path, **settings).merge_and_unload().eval()
    given = inputs(tmp_path, model)
    assert why_no_gguf_lora(candidate(given.adapter)) is None
    export_gguf_lora(given)
    reader = gguf.GGUFReader(str(given.output))
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert (facts["general.type"], facts["adapter.type"]) == ("adapter", "lora")
    assert facts["general.architecture"] == "llama"
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    base, merged = random_llama(100).state_dict(), model.state_dict()
    checked = 0
    for name, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", None)):
        module = f"model.layers.1.self_attn.{name}.weight"
        own = f"blk.1.attn_{name[0]}.weight"
        a, b = tensors[f"{own}.lora_a"], tensors[f"{own}.lora_b"]
        found = facts["adapter.lora.alpha"] / len(a) * b @ a
        if heads is not None:
            # In a base file for llama.cpp, features of a pair are neighbours.
            found = found.reshape(heads, -1, 2, 64).swapaxes(1, 2).reshape(found.shape)
        expected = (merged[module] - base[module]).numpy()
        assert np.abs(expected).max() > 0.05
        np.testing.assert_allclose(found, expected, atol=1e-5)
        checked += 1
    assert checked == 3
    assert "output.weight.lora_a" in tensors

    loaded = read_gguf_lora(
        given.output,
        Reading(auto_class="AutoModelForCausalLM", load_base=lambda: random_llama(100)),
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-4, rtol=0)
        assert (random_llama(100)(IDS).logits - model(IDS).logits).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "of the variant dora"),
        (
            {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
            "was trained as well",
        ),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "updates of the linear layers"),
        ({"lora_bias": True}, "updates of the linear layers"),
    ],
)
def test_what_llama_cpp_does_not_add_is_refused(
    tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    trained(tmp_path, **settings)
    refusal = why_no_gguf_lora(candidate(load_peft(tmp_path)))
    assert refusal is not None
    assert reason in refusal.reason
    assert refusal.fix == "format=gguf writes the merged model"


def test_other_tasks_and_what_is_no_adapter_are_refused() -> None:
    refusal = why_no_gguf_lora(candidate(object()))
    assert refusal is not None
    assert "something else was trained" in refusal.reason
    refusal = why_no_gguf_lora(candidate(None, auto_class="AutoModelForTokenClassification"))
    assert refusal is not None
    assert "head" in refusal.reason
    assert refusal.fix == "format=peft"
