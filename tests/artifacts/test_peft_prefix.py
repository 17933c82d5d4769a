"""Prefixes in files: what PEFT loads of ours, and what we load of PEFT's."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from lora_cli.artifacts.peft_prefix import is_prefix, load_prefix, prefix_files
from lora_cli.artifacts.tuned import Tuned
from lora_cli.config.strategies import PrefixStrategyConfig
from lora_cli.errors import UserError
from lora_cli.lora.prefix import STATE, PrefixSize
from lora_cli.lora.state import adapter_state, load_adapter_state
from lora_cli.lora.strategies import apply_strategy

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ONES = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_labels": 3, "vocab_size": 60}
CONFIGS: dict[str, Any] = {
    "bert": transformers.BertConfig(**SMALL),
    "roberta": transformers.RobertaConfig(**SMALL),
    "gpt2": transformers.GPT2Config(**ONES, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama": transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "qwen3": transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16),
    "falcon": transformers.FalconConfig(
        **ONES, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
}
# A head that is new, and in BERT a pooler that the base weights lack as well.
NEW = {
    "bert": ("bert.pooler", "classifier"),
    "roberta": ("classifier",),
    "gpt2": ("score",),
    "llama": ("score",),
    "qwen3": ("score",),
    "falcon": ("score",),
}
IDS = torch.tensor([[11, 5, 7, 9, 3, 4, 8], [12, 6, 4, 21, 33, 0, 0]])
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


def build(family: str, *, head_seed: int) -> Any:
    """The same backbone each time, and a head and pooler that start anew."""
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(CONFIGS[family])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    torch.manual_seed(head_seed)
    for name in NEW[family]:
        for parameter in model.get_submodule(name).parameters():
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def write(folder: Path, family: str) -> torch.Tensor:
    """Write a prefix, and return its logits."""
    model = build(family, head_seed=1)
    applied = apply_strategy(model, PrefixStrategyConfig(num_tokens=5), NEW[family], seed=3)
    assert applied.saved == NEW[family]
    assert applied.prefix is not None
    tuned = Tuned(
        state=adapter_state(model, applied.saved),
        saved_modules=applied.saved,
        task_type="SEQ_CLS",
        base_name="org/base",
        revision="main",
        prefix=applied.prefix,
    )
    for name, content in prefix_files(tuned, applied.prefix).items():
        (folder / name).write_bytes(content)
    logits: torch.Tensor = model(input_ids=IDS, attention_mask=MASK).logits
    return logits


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("family", CONFIGS)
def test_peft_loads_ours(family: str, tmp_path: Path) -> None:
    logits = write(tmp_path, family)
    base = build(family, head_seed=2)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    found = theirs(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "falcon"])
def test_we_load_theirs_and_write_the_same(family: str, tmp_path: Path) -> None:
    extra = [name for name in NEW[family] if name not in ("classifier", "score")]
    config = peft.PrefixTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=5, modules_to_save=extra or None
    )
    theirs = peft.get_peft_model(build(family, head_seed=1), config).eval()
    for name, parameter in theirs.named_parameters():
        if ".modules_to_save." in name:
            nn.init.normal_(parameter, std=0.2)
    logits = theirs(input_ids=IDS, attention_mask=MASK).logits
    theirs.save_pretrained(str(tmp_path))

    assert is_prefix(tmp_path)
    tuned = load_prefix(tmp_path)
    model = build(family, head_seed=2)
    applied = apply_strategy(model, PrefixStrategyConfig(num_tokens=5), NEW[family], seed=7)
    assert tuned.prefix == applied.prefix
    load_adapter_state(model, tuned.state, applied.saved)
    ours = model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(ours, logits, atol=1e-5, rtol=0)

    assert tuned.prefix is not None
    again = Tuned(
        state=tuned.state,
        saved_modules=applied.saved,
        task_type=tuned.task_type,
        base_name=tuned.base_name,
        revision=tuned.revision,
        prefix=tuned.prefix,
    )
    files = prefix_files(again, tuned.prefix)
    (tmp_path / "ours").mkdir()
    for name, content in files.items():
        (tmp_path / "ours" / name).write_bytes(content)
    weights = "adapter_model.safetensors"
    wanted, found = load_file(tmp_path / weights), load_file(tmp_path / "ours" / weights)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    theirs_config = json.loads((tmp_path / "adapter_config.json").read_bytes())
    ours_config = json.loads(files["adapter_config.json"])
    # Heads are listed by both; which of the usual ones there are, PEFT does not look at.
    for config_file in (theirs_config, ours_config):
        del config_file["modules_to_save"], config_file["peft_version"]
        # The width of a network that is not there.
        del config_file["encoder_hidden_size"]
    assert ours_config == theirs_config


def change(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"num_virtual_tokens": 0}, '"num_virtual_tokens", but has 0'),
        ({"num_layers": True}, '"num_layers", but has True'),
        ({"num_attention_heads": None}, '"num_attention_heads", but has None'),
        ({"token_dim": 10**9}, '"token_dim", but has 1000000000'),
        ({"token_dim": 33}, '"token_dim", but has 33'),
        ({"num_transformer_submodules": 2}, '"num_transformer_submodules", but has 2'),
        ({"task_type": 3}, '"task_type", but has 3'),
        ({"modules_to_save": "classifier"}, "\"modules_to_save\", but has 'classifier'"),
        ({"qurey": 1}, "known keys only, but has 'qurey'"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, values: dict[str, Any], found: str) -> None:
    write(tmp_path, "bert")
    change(tmp_path, **values)
    with pytest.raises(UserError) as caught:
        load_prefix(tmp_path)
    problem = caught.value.problems[0]
    assert problem.id == "adapter.bad-value"
    assert found in problem.message


@pytest.mark.parametrize(
    ("size", "stray", "found"),
    [
        ((5, 7), {}, r"of shape \(5, 128\), but that is \(5, 7\)"),
        (None, {}, "must hold prompt_embeddings, but does not"),
        ((5, 128), {"classifier.weight": torch.ones(1)}, "also holds classifier.weight"),
    ],
)
def test_tensors_without_a_place_are_named(
    tmp_path: Path, size: tuple[int, int] | None, stray: dict[str, torch.Tensor], found: str
) -> None:
    from safetensors.torch import save_file

    write(tmp_path, "bert")
    tensors = dict(stray) if size is None else {"prompt_embeddings": torch.ones(size), **stray}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=found):
        load_prefix(tmp_path)


def test_a_prefix_is_told_from_other_adapters(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    assert not is_prefix(tmp_path)
    for text in ('{"peft_type": "LORA"}', "[]", "{", "1" * 100, "[" * 100_000):
        path.write_text(text)
        assert not is_prefix(tmp_path)
    path.write_text('{"peft_type": "PREFIX_TUNING"}')
    assert is_prefix(tmp_path)
    path.write_text('{"peft_type": "PREFIX_TUNING"}' + " " * (1 << 20))
    assert not is_prefix(tmp_path)


def test_the_shape_of_the_matrix_follows_from_the_sizes() -> None:
    size = PrefixSize(num_tokens=5, num_layers=3, num_heads=2, head_size=4)
    assert size.token_size == 8
    assert size.shape == (5, 48)
    tuned = Tuned(state={STATE: torch.ones(size.shape)})
    config = json.loads(prefix_files(tuned, size)["adapter_config.json"])
    assert (config["token_dim"], config["num_attention_heads"]) == (8, 2)
    assert config["modules_to_save"] is None
