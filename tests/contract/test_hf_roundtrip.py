"""The merged folder is an ordinary Hugging Face model: loaded without us, equal to PEFT's merge."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

# peft 0.21 asks transformers for a property that transformers 5 has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture(scope="module")
def merged(tiny_run: Any, run_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "merged"
    finished = run_cli("merge", "runs/a", f"output={folder}", "--json", cwd=tiny_run.cwd)
    assert finished.code == 0, finished.err
    (result,) = finished.lines
    assert result["output"] == str(folder)
    assert result["dtype"] == "float32"
    assert result["rows"] == 32
    assert result["agreement"] == 1.0
    assert result["max_abs_difference"] <= 1e-5
    return folder


def texts_of(run: Any) -> list[str]:
    lines = (run.data / "test.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def logits_of(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        found = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    return torch.as_tensor(found).float()


def peft_merged(base: Path, adapter: Path, **options: Any) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, **options)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()


def test_logits_equal_those_of_pefts_own_merge(tiny_run: Any, merged: Path) -> None:
    tokenizer, texts = AutoTokenizer.from_pretrained(merged), texts_of(tiny_run)
    ours, info = AutoModelForSequenceClassification.from_pretrained(
        merged, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    theirs = peft_merged(tiny_run.base, tiny_run.path / "adapter")
    found = logits_of(ours.eval(), tokenizer, texts)
    expected = logits_of(theirs, AutoTokenizer.from_pretrained(tiny_run.base), texts)
    assert float((found - expected).abs().max()) <= 1e-5
    base = AutoModelForSequenceClassification.from_pretrained(tiny_run.base, num_labels=2).eval()
    assert float((logits_of(base, tokenizer, texts) - expected).abs().max()) > 0.01


def test_a_pipeline_gives_our_labels(tiny_run: Any, run_cli: Any, merged: Path) -> None:
    classify: Any = transformers.pipeline("text-classification", model=str(merged), top_k=None)
    texts = texts_of(tiny_run)[:6]
    stdin = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    ours = run_cli("predict", "runs/a", cwd=tiny_run.cwd, stdin=stdin).lines
    for scores, line in zip(classify(texts), ours, strict=True):
        found = {score["label"]: score["score"] for score in scores}
        assert found == pytest.approx(line["probabilities"], abs=1e-5)


def test_the_folder_has_no_trace_of_us(merged: Path) -> None:
    names = {path.name for path in merged.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {name for name in names if "adapter" in name or "lora" in name}
    # The list of files says who wrote it, since other programs have lists of that name.
    for path in (path for path in merged.iterdir() if path.name != "MANIFEST.json"):
        content = path.read_bytes().lower()
        for trace in (b"lora_cli", b"lora-cli", b"lora_a", b"peft"):
            assert trace not in content, path.name
    config = json.loads((merged / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_only_what_was_trained_differs_from_the_base(tiny_run: Any, merged: Path) -> None:
    before = load_file(tiny_run.base / "model.safetensors")
    after = load_file(merged / "model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[f"bert.{name}"])}
    changed = set(before) - same
    assert changed == {
        f"encoder.layer.{number}.attention.self.{target}.weight"
        for number in (0, 1)
        for target in ("query", "value")
    }
    new = set(after) - {f"bert.{name}" for name in before}
    kinds = ("weight", "bias")
    assert new == {
        f"{head}.{kind}" for head in ("bert.pooler.dense", "classifier") for kind in kinds
    }


def test_new_modules_are_in_the_adapter(tiny_run: Any) -> None:
    """The base has neither pooler nor classifier: both were random, so both must be saved."""
    base = load_file(tiny_run.base / "model.safetensors")
    assert not [name for name in base if "pooler" in name or "classifier" in name]
    adapter = load_file(tiny_run.path / "adapter" / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.") for name in adapter}
    kinds = ("weight", "bias")
    heads = {f"{head}.{kind}" for head in ("bert.pooler.dense", "classifier") for kind in kinds}
    assert heads <= names
    assert all("lora_" in name for name in names - heads)


def test_a_half_precision_base_stays_so(
    tiny_model_dir: Callable[..., Path], tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    base = tiny_model_dir(dtype="bfloat16")
    settings = [text for text in tiny_run.settings if not text.startswith("model.path")]
    trained = run_cli("train", f"model.path={base}", *settings, "run.name=a", cwd=tmp_path)
    assert trained.code == 0, trained.err
    done = run_cli("merge", "runs/a", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.lines[0]["dtype"] == "bfloat16"
    adapter = load_file(tmp_path / "runs" / "a" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    after = load_file(tmp_path / "runs" / "a" / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    before = load_file(base / "model.safetensors")
    prefix, name = "base_model.model.bert.", "encoder.layer.0.attention.self.value"
    up, down = adapter[f"{prefix}{name}.lora_B.weight"], adapter[f"{prefix}{name}.lora_A.weight"]
    exact = before[f"{name}.weight"].float() + (16.0 / 4) * up @ down
    assert torch.equal(after[f"bert.{name}.weight"], exact.bfloat16())
