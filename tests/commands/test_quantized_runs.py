"""Training on bases that are quantized, in a GGUF file, or mixtures of experts, end to end."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

_spec = importlib.util.spec_from_file_location(
    "gguf_file", Path(__file__).parents[1] / "models" / "gguf_file.py"
)
assert _spec is not None
assert _spec.loader is not None
writing = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(writing)

Run = Callable[..., Any]


def settings_of(base: Path, data: Path, **changes: object) -> list[str]:
    settings: dict[str, object] = {
        "model.path": base,
        "task": "text_classification",
        "task.data.path": data,
        "task.max_length": 32,
        "lora.r": 4,
        "optimizer.lr": 0.01,
        "trainer.max_steps": 4,
        "trainer.global_batch_size": 16,
        "trainer.eval_steps": 2,
        "trainer.save_steps": 1,
    }
    given = {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{name}={value}" for name, value in {**settings, **given}.items()]


def result_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "result.json").read_text())
    return found


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_train_merge_eval_predict_on_a_quantized_base(
    kind: str, tiny_model_dir: Run, toy_reviews: Path, run_cli: Run, tmp_path: Path
) -> None:
    base = tiny_model_dir(hidden=64)
    settings = settings_of(base, toy_reviews, model__quantization=kind, lora__targets="all-linear")
    trained = run_cli("train", *settings, "run.name=a", cwd=tmp_path)
    assert trained.code == 0, trained.err
    assert f"quantized: 12 layers to {kind}" in trained.err
    assert "merged into the weights as they were before quantization" in trained.err
    run = tmp_path / "runs" / "a"
    state = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len([name for name in state if "lora_" in name]) == 24
    assert all(value.dtype == torch.float32 for value in state.values())
    assert all(value.abs().max() > 0 for name, value in state.items() if "lora_B" in name)
    assert result_of(run)["trainable_parameters"] == sum(value.numel() for value in state.values())

    note = f"the adapter was trained on weights in {kind}; the base is used here as it was before"
    merged = run_cli("merge", run, f"output={tmp_path / 'merged'}", "--json", cwd=tmp_path)
    assert merged.code == 0, merged.err
    assert note in merged.err
    assert merged.lines[0]["max_abs_difference"] <= 1e-4
    # On these rows training measured both as well: the adapter where it was trained, and merged.
    scores = merged.lines[0]["scores"]
    assert (scores["split"], scores["rows"]) == ("validation", 32)
    for form, name in (("quantized", "adapter"), ("merged", "merged")):
        assert scores[form] == pytest.approx(result_of(run)[name], rel=1e-5), form
    assert scores["quantized"]["loss"] != scores["merged"]["loss"]
    assert f"{kind} base and adapter" in merged.err
    # Exactly the stored base plus the update.
    whole = load_file(tmp_path / "merged" / "model.safetensors")
    plain = load_file(base / "model.safetensors")
    name = "encoder.layer.1.attention.self.query"
    a, b = (state[f"base_model.model.bert.{name}.lora_{x}.weight"] for x in "AB")
    assert torch.equal(whole[f"bert.{name}.weight"], plain[f"{name}.weight"] + b @ a * 4.0)

    evaluated = run_cli("eval", run, "--json", cwd=tmp_path)
    assert evaluated.code == 0, evaluated.err
    assert note in evaluated.err
    found = evaluated.lines[0]
    assert found["adapter"]["loss"] == pytest.approx(found["merged"]["loss"], abs=1e-4)
    predicted = run_cli("predict", run, "text=a good film", cwd=tmp_path)
    assert predicted.code == 0, predicted.err
    assert predicted.lines[0]["label"] in ("negative", "positive")


def test_resumed_run_is_the_same(
    tiny_model_dir: Run, toy_reviews: Path, run_cli: Run, tmp_path: Path
) -> None:
    base = tiny_model_dir(hidden=64)
    settings = settings_of(
        base,
        toy_reviews,
        model__quantization="nf4",
        lora__targets="[query,value]",
        trainer__keep_checkpoints=4,
    )
    whole = run_cli("train", *settings, "run.name=whole", cwd=tmp_path)
    assert whole.code == 0, whole.err
    cut = tmp_path / "runs" / "cut"
    shutil.copytree(tmp_path / "runs" / "whole", cut)
    (cut / "result.json").unlink()
    for step in (3, 4):
        shutil.rmtree(cut / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    if not any((cut / "checkpoints").iterdir()):
        pytest.fail("no checkpoint is left to resume from")
    resumed = run_cli("train", *settings, "run.name=cut", "--resume", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert "resuming after step" in resumed.err
    first, second = (
        (tmp_path / "runs" / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("whole", "cut")
    )
    assert first == second


def test_strategy_that_trains_the_weights_is_refused(
    tiny_model_dir: Run, toy_reviews: Path, run_cli: Run, tmp_path: Path
) -> None:
    settings = settings_of(tiny_model_dir(), toy_reviews, model__quantization="nf4")
    settings = [value for value in settings if not value.startswith("lora.")]
    refused = run_cli("train", *settings, "strategy=full", cwd=tmp_path)
    assert refused.code == 2
    assert "model.quantization" in refused.err


@pytest.mark.parametrize("kind", [pytest.param("F32", marks=pytest.mark.slow), "Q8_0"])
def test_train_and_merge_on_a_gguf_file(
    kind: str, toy_reviews: Path, run_cli: Run, tmp_path: Path
) -> None:
    base = tmp_path / "tiny.gguf"
    writing.write_gguf(base, writing.tiny_llama(), kind=kind)
    settings = settings_of(base, toy_reviews, lora__targets="[q_proj,v_proj]")
    trained = run_cli("train", *settings, "run.name=a", cwd=tmp_path)
    assert trained.code == 0, trained.err
    run = tmp_path / "runs" / "a"
    recorded = json.loads((run / "environment.json").read_text())["base"]
    assert recorded["name"] == str(base)
    merged = run_cli("merge", run, f"output={tmp_path / 'merged'}", "--json", cwd=tmp_path)
    assert merged.code == 0, merged.err
    assert merged.lines[0]["max_abs_difference"] <= 1e-4
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert not getattr(model, "is_quantized", False)
    evaluated = run_cli("eval", run, f"merged={tmp_path / 'merged'}", "--json", cwd=tmp_path)
    assert evaluated.code == 0, evaluated.err
    # The very file, wherever it is; another one is refused.
    moved = base.rename(tmp_path / "moved.gguf")
    assert run_cli("predict", run, f"base={moved}", "text=good", cwd=tmp_path).code == 0
    writing.write_gguf(base, writing.tiny_llama(seed=1), kind=kind)
    other = run_cli("predict", run, "text=good", cwd=tmp_path)
    assert other.code == 2
    assert "must have the weights that the adapter was trained on" in other.err


def test_gguf_in_4_bits_for_training(toy_reviews: Path, run_cli: Run, tmp_path: Path) -> None:
    base = tmp_path / "tiny.gguf"
    writing.write_gguf(base, writing.tiny_llama())
    settings = settings_of(
        base, toy_reviews, model__quantization="nf4", lora__targets="[q_proj,v_proj]"
    )
    trained = run_cli("train", *settings, "run.name=a", cwd=tmp_path)
    assert trained.code == 0, trained.err
    assert "quantized: 14 layers to nf4" in trained.err


@pytest.fixture
def tiny_mixtral(tiny_model_dir: Run, tmp_path: Path) -> Path:
    """A random Mixtral with the vocabulary of the tiny BERT."""
    folder = tmp_path / "mixtral"
    shutil.copytree(tiny_model_dir(), folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).model.save_pretrained(folder)
    return folder


def test_train_and_merge_fused_experts(
    tiny_mixtral: Path, toy_reviews: Path, run_cli: Run, tmp_path: Path
) -> None:
    settings = settings_of(
        tiny_mixtral,
        toy_reviews,
        lora__targets="[q_proj]",
        lora__target_parameters="[experts.gate_up_proj,experts.down_proj]",
    )
    trained = run_cli("train", *settings, "run.name=a", cwd=tmp_path)
    assert trained.code == 0, trained.err
    run = tmp_path / "runs" / "a"
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert config["target_modules"] == ["q_proj"]
    state = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(value.abs().max() > 0 for name, value in state.items() if "lora_B" in name)
    merged = run_cli("merge", run, f"output={tmp_path / 'merged'}", "--json", cwd=tmp_path)
    assert merged.code == 0, merged.err
    assert merged.lines[0]["max_abs_difference"] <= 1e-4

    unmatched = settings_of(
        tiny_mixtral,
        toy_reviews,
        lora__targets="[q_porj]",
        lora__target_parameters="[experts.dwon_proj]",
    )
    refused = run_cli("train", *unmatched, "run.name=b", cwd=tmp_path)
    assert refused.code == 2
    assert 'did you mean "experts.down_proj"?' in refused.err
    assert 'did you mean "q_proj"?' in refused.err
    assert not (tmp_path / "runs" / "b").exists()
