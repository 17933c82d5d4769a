"""Merging tensor by tensor: the bits of peft, in a folder that transformers loads."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from made_adapter import make_adapter, store
from safetensors.torch import load_file

from lora_cli.lora.settings import LoraSettings
from lora_cli.models.weights import INDEX, weight_files

# PEFT asks a model by a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PLAIN = LoraSettings(r=4, alpha=8)
PATTERNS = LoraSettings(
    r=4, alpha=8, rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}
)
DORA = LoraSettings(r=4, alpha=8, variant="dora")
IDS = torch.tensor([[2, 9, 31, 17, 40, 3]])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for name in weight_files(folder) for k, v in load_file(folder / name).items()}


def merged_by_peft(base: Path, adapter: Path, folder: Path, auto: str) -> dict[str, torch.Tensor]:
    model = getattr(transformers, auto).from_pretrained(base, dtype="auto")
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(folder)
    return tensors(folder)


def assert_same_bits(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(input_ids=ids).logits.float()
    return result


@pytest.mark.parametrize(
    ("kind", "dtype", "shards", "settings", "targets", "in_names"),
    [
        ("llama", "bfloat16", "30KB", PLAIN, LINEAR, True),
        ("llama", "float16", "50GB", PATTERNS, LINEAR, True),
        ("llama", "float32", "40KB", DORA, LINEAR, True),
        ("llama", "bfloat16", "50GB", DORA, LINEAR, True),
        ("llama", "float32", "50GB", PLAIN, ["embed_tokens", "q_proj"], False),
        ("gpt2", "float16", "50GB", PLAIN, ["c_attn", "c_proj"], False),
        ("gpt2", "float32", "30KB", PATTERNS, ["c_attn", "c_fc"], False),
        ("gpt_neox", "float32", "50GB", PLAIN, ["query_key_value", "dense"], True),
    ],
)
def test_the_bits_of_peft(
    tiny_language_dir: Callable[..., Path],
    tmp_path: Path,
    run_cli: Any,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    dtype: str,
    shards: str,
    settings: LoraSettings,
    targets: list[str],
    in_names: bool,
) -> None:
    base = store(tiny_language_dir(kind), tmp_path / "base", dtype=dtype, shard_size=shards)
    adapter = make_adapter(tmp_path / "adapter", base, settings, targets=targets)
    if in_names:
        monkeypatch.setattr("lora_cli.commands.outline.outline", None)
    finished = run_cli("merge", adapter, "output=m", "verify=layers", "--json", cwd=tmp_path)
    assert finished.code == 0, finished.err
    assert "merged tensor by tensor" in finished.err
    assert finished.lines[0]["largest_difference"] <= 1
    merged = tmp_path / "m"
    assert weight_files(merged) == weight_files(base)
    expected = merged_by_peft(base, adapter, tmp_path / "peft", "AutoModelForCausalLM")
    assert_same_bits(tensors(merged), expected)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        merged, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.dtype == getattr(torch, dtype)
    if len(weight_files(base)) > 1:
        ours, theirs = (json.loads((f / INDEX).read_text()) for f in (merged, base))
        assert ours == theirs


def test_a_classifier_on_an_encoder(tiny_run: Any, tmp_path: Path, run_cli: Any) -> None:
    output = f"output={tmp_path / 'm'}"
    finished = run_cli("merge", tiny_run.path, output, "verify=layers", cwd=tmp_path)
    assert finished.code == 0, finished.err
    assert "merged tensor by tensor" in finished.err
    auto = "AutoModelForSequenceClassification"
    adapter = tiny_run.path / "adapter"
    expected = merged_by_peft(tiny_run.base, adapter, tmp_path / "peft", auto)
    assert_same_bits(tensors(tmp_path / "m"), expected)
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_stacks_of_experts(
    tiny_language_dir: Callable[..., Path], tmp_path: Path, run_cli: Any
) -> None:
    config = transformers.GptOssConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=3,
        vocab_size=200,
        layer_types=["full_attention"],
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    base = tmp_path / "base"
    model.save_pretrained(base)
    transformers.AutoTokenizer.from_pretrained(tiny_language_dir("llama")).save_pretrained(base)
    adapter = make_adapter(
        tmp_path / "a",
        base,
        PLAIN,
        targets=["q_proj"],
        parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    finished = run_cli("merge", adapter, "output=m", "verify=layers", cwd=tmp_path)
    assert finished.code == 0, finished.err
    assert "merged tensor by tensor" in finished.err
    expected = merged_by_peft(base, adapter, tmp_path / "peft", "AutoModelForCausalLM")
    assert_same_bits(tensors(tmp_path / "m"), expected)


def test_shared_embeddings_that_differ_are_parted(
    tiny_language_dir: Callable[..., Path], tmp_path: Path, run_cli: Any
) -> None:
    base = tiny_language_dir("gpt2")
    adapter = make_adapter(tmp_path / "a", base, PLAIN, targets=["wte", "c_attn"])
    finished = run_cli("merge", adapter, "output=m", "verify=layers", cwd=tmp_path)
    assert finished.code == 0, finished.err
    assert "merged tensor by tensor" in finished.err
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert merged.config.tie_word_embeddings is False
    assert merged.lm_head.weight is not merged.transformer.wte.weight
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    before = plain.lm_head.weight.clone()
    assert torch.equal(merged.lm_head.weight, before)
    expected = logits(peft.PeftModel.from_pretrained(plain, adapter))
    assert torch.allclose(logits(merged), expected, atol=1e-4)


def test_new_tokens_come_along(
    tiny_language_dir: Callable[..., Path], tmp_path: Path, run_cli: Any
) -> None:
    base, tokens = tiny_language_dir("gpt2"), ("<a>", "film", "<b>")
    adapter = make_adapter(tmp_path / "a", base, PLAIN, targets=["c_attn"], tokens=tokens)
    finished = run_cli("merge", adapter, "output=m", "verify=layers", cwd=tmp_path)
    assert finished.code == 0, finished.err
    assert "merged tensor by tensor" in finished.err
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(["the", *tokens])])
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    rows = load_file(adapter / "adapter_model.safetensors")
    (name,) = (name for name in rows if "trainable_tokens" in name)
    assert torch.equal(merged.get_input_embeddings().weight[ids[0, 1:]], rows[name])
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert torch.isfinite(logits(merged, ids)).all()


def test_what_needs_the_model_says_why(
    tiny_language_dir: Callable[..., Path], tmp_path: Path, run_cli: Any
) -> None:
    """The scores of a llama's new tokens are random, and no part of an adapter."""
    base = tiny_language_dir("llama")
    adapter = make_adapter(tmp_path / "a", base, PLAIN, targets=["q_proj"], tokens=("<a>",))
    refused = run_cli("merge", adapter, "output=m", "verify=layers", cwd=tmp_path)
    assert refused.code == 2
    assert "error[merge.no-layers]" in refused.err
    assert not (tmp_path / "m").exists()
    finished = run_cli("merge", adapter, "output=m", "max_shard_size=30KB", cwd=tmp_path)
    assert finished.code == 0, finished.err
    why = "lm_head.weight is of another shape in the files"
    assert f"merging through the whole model, since {why}" in finished.err
    assert "not compared, since the adapter does not know where its rows are" in finished.err
    assert len(weight_files(tmp_path / "m")) > 1


def test_another_format_and_other_files(
    tiny_language_dir: Callable[..., Path], tmp_path: Path, run_cli: Any
) -> None:
    base = tiny_language_dir("llama")
    adapter = make_adapter(tmp_path / "a", base, PLAIN, targets=LINEAR)
    settings = ("dtype=bfloat16", "max_shard_size=20KB", "verify=layers", "sync=false")
    finished = run_cli("merge", adapter, "output=m", *settings, cwd=tmp_path)
    assert finished.code == 0, finished.err
    expected = merged_by_peft(base, adapter, tmp_path / "peft", "AutoModelForCausalLM")
    merged = tensors(tmp_path / "m")
    assert_same_bits(merged, {name: t.bfloat16() for name, t in expected.items()})
    assert len(weight_files(tmp_path / "m")) == 3
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    for name in weight_files(tmp_path / "m"):
        held = sum(t.nbytes for t in load_file(tmp_path / "m" / name).values())
        assert held <= 20_000 or len(load_file(tmp_path / "m" / name)) == 1


def test_other_weights_are_refused_and_nothing_is_left(
    tiny_language_dir: Callable[..., Path], tmp_path: Path, run_cli: Any
) -> None:
    adapter = make_adapter(tmp_path / "a", tiny_language_dir("llama"), PLAIN, targets=LINEAR)
    other = tiny_language_dir("llama", seed=1)
    before = sorted(tmp_path.iterdir())
    settings = (f"base={other}", "output=m", "verify=layers")
    finished = run_cli("merge", adapter, *settings, cwd=tmp_path)
    assert finished.code == 2
    assert "error[adapter.other-base]" in finished.err
    assert "has others" in finished.err
    assert sorted(tmp_path.iterdir()) == before
