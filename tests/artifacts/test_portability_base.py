"""The layers of base models, as torch and PEFT see them."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from stranger_adapters import errors, findings

from lora_cli.artifacts.portability_base import describe_base

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SIZES: dict[str, Any] = {"vocab_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(*, tied: bool) -> Any:
    config = transformers.LlamaConfig(
        **SIZES, hidden_size=16, intermediate_size=24, tie_word_embeddings=tied
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_inner=24)
    with torch.device("meta"):
        return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("make", [lambda: llama(tied=False), gpt2], ids=["llama", "gpt2"])
def test_sizes_are_those_of_the_factors_of_peft(make: Any, tmp_path: Path) -> None:
    base = describe_base(make())
    model = peft.get_peft_model(
        make(), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    state = {
        name: torch.randn(tensor.shape)
        for name, tensor in peft.get_peft_model_state_dict(model).items()
    }
    model.peft_config["default"].base_model_name_or_path = "org/model"
    model.save_pretrained(tmp_path, state_dict={f"{n}": x for n, x in state.items()})
    assert len(state) >= 16
    assert errors(tmp_path, "peft", base=base) == set()
    # Another base has other sizes.
    other = describe_base(llama(tied=False) if make is gpt2 else gpt2())
    assert errors(tmp_path, "peft", base=other) == {"base.layers"}


def test_wider_base_of_the_same_names_is_another(tmp_path: Path) -> None:
    model = peft.get_peft_model(
        llama(tied=False).to_empty(device="cpu"), peft.LoraConfig(target_modules=["down_proj"])
    )
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    model.save_pretrained(tmp_path)
    config = transformers.LlamaConfig(**SIZES, hidden_size=16, intermediate_size=28)
    with torch.device("meta"):
        wider = describe_base(transformers.LlamaForCausalLM(config))
    (found,) = (x for x in findings(tmp_path, "peft", base=wider) if x.severity == "error")
    assert found.id == "base.sizes"
    assert "24 to 16, in the base 28 to 16" in found.text


def test_tied_layers() -> None:
    assert describe_base(llama(tied=True)).tied == {"lm_head", "model.embed_tokens"}
    assert describe_base(llama(tied=False)).tied == set()
    assert describe_base(gpt2()).tied == {"lm_head", "transformer.wte"}


def test_body_alone_knows_the_paths_of_the_whole() -> None:
    with torch.device("meta"):
        body = transformers.AutoModel.from_config(llama(tied=True).config)
    found = describe_base(body)
    assert {"layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"} <= found.modules
    assert found.sizes["model.layers.0.mlp.down_proj"] == (24, 16)
    assert found.tied == set()
