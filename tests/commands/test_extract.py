"""`lora-cli extract`: the update between two checkpoints, read and run by peft."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

CLASS = transformers.AutoModelForSequenceClassification
# peft asks a transformers model for an attribute that has another name now.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.fixture(scope="module")
def merged(tiny_run: Any, run_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run, merged: a checkpoint whose difference from its base has the adapter's rank."""
    folder = tmp_path_factory.mktemp("extract") / "merged"
    done = run_cli("merge", tiny_run.path, f"output={folder}", cwd=folder.parent)
    assert done.code == 0, done.err
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[2, 5, 6, 7, 3]])).logits


def extract(run_cli: Any, base: Path, tuned: Path, output: Path, *more: str) -> Any:
    return run_cli(
        *("extract", f"base={base}", f"tuned={tuned}", f"output={output}", "--json", *more),
        cwd=output.parent,
    )


def test_peft_runs_what_was_extracted_as_the_tuned_checkpoint(
    tiny_run: Any, merged: Path, run_cli: Any, tmp_path: Path
) -> None:
    done = extract(run_cli, tiny_run.base, merged, tmp_path / "adapter", "lora.r=4")
    assert done.code == 0, done.err
    result = done.lines[0]
    assert result["energy"] == pytest.approx(1.0, abs=1e-4)
    assert result["saved_modules"] == ["bert.pooler.dense", "classifier"]
    assert result["left_out"] == []
    trained = json.loads((tiny_run.path / "adapter" / "adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in result["layers"]} == set(trained["target_modules"])
    expected = CLASS.from_pretrained(merged)
    base = CLASS.from_pretrained(tiny_run.base, num_labels=expected.config.num_labels)
    found = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-4, atol=1e-4)


def test_less_rank_keeps_less_energy(
    tiny_run: Any, merged: Path, run_cli: Any, tmp_path: Path
) -> None:
    done = extract(run_cli, tiny_run.base, merged, tmp_path / "adapter", "lora.r=1")
    assert done.code == 0, done.err
    before, after = (load_file(p / "model.safetensors") for p in (tiny_run.base, merged))
    for name, found in done.lines[0]["layers"].items():
        key = f"{name}.weight" if f"{name}.weight" in before else f"{name.partition('.')[2]}.weight"
        s = torch.linalg.svdvals((after[f"{name}.weight"] - before[key]).double())
        assert found["energy"] == pytest.approx(float(s[0] ** 2 / s.square().sum()), rel=1e-4)


def test_what_is_no_linear_layer_is_told(merged: Path, run_cli: Any, tmp_path: Path) -> None:
    tuned = Path(shutil.copytree(merged, tmp_path / "tuned"))
    (tuned / "MANIFEST.json").unlink()
    weights = load_file(tuned / "model.safetensors")
    norm = next(name for name in weights if name.endswith("LayerNorm.weight"))
    linear = next(name for name in weights if name.endswith("query.weight"))
    weights[norm] += 1
    weights[linear][0, 0] += 1
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    done = extract(run_cli, merged, tuned, tmp_path / "adapter")
    assert done.code == 0, done.err
    result = done.lines[0]
    assert result["left_out"] == [norm]
    assert f"left out, since they are no linear layers of their own: {norm}" in done.err
    assert result["energy"] == pytest.approx(1 / (1 + len(weights[norm])), rel=1e-3)


def test_equal_or_unlike_checkpoints_are_refused(
    tiny_run: Any, merged: Path, run_cli: Any, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    same = extract(run_cli, merged, merged, output)
    assert (same.code, "error[extract.nothing]" in same.err) == (2, True), same.err
    other = tmp_path / "other"
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20)
    transformers.GPT2LMHeadModel(config).save_pretrained(other)
    unlike = extract(run_cli, other, merged, output)
    assert (unlike.code, "error[extract.unlike]" in unlike.err) == (2, True), unlike.err
    missing = extract(run_cli, tmp_path / "nowhere", merged, output)
    assert missing.code == 2
    assert "`base` must name a folder" in missing.err
    assert "model.path" not in missing.err.partition("allowed")[0]
    assert not output.exists()


def test_conv1d_layers_and_tied_embeddings(run_cli: Any, tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        weight = model.transformer.h[0].attn.c_attn.weight
        weight += torch.outer(torch.randn(16), torch.randn(48))
        model.transformer.wte.weight[3] += 1
    model.save_pretrained(tmp_path / "after")
    done = extract(run_cli, tmp_path / "before", tmp_path / "after", tmp_path / "a", "lora.r=2")
    assert done.code == 0, done.err
    assert list(done.lines[0]["layers"]) == ["transformer.h.0.attn.c_attn"]
    assert done.lines[0]["left_out"] == ["transformer.wte.weight"]
    base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "before")
    found = peft.PeftModel.from_pretrained(base, tmp_path / "a").merge_and_unload()
    torch.testing.assert_close(
        found.transformer.h[0].attn.c_attn.weight, weight, rtol=1e-4, atol=1e-4
    )


def small_bert(**options: Any) -> Any:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return transformers.BertConfig(**sizes, intermediate_size=8, vocab_size=20, **options)


def test_a_head_that_no_family_has_is_refused(run_cli: Any, tmp_path: Path) -> None:
    model = transformers.BertForPreTraining(small_bert())
    model.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight[0] += 1
        model.cls.predictions.transform.dense.weight += 1
    model.save_pretrained(tmp_path / "after")
    done = extract(run_cli, tmp_path / "before", tmp_path / "after", tmp_path / "adapter")
    assert done.code == 2
    assert "error[extract.unknown-head]" in done.err
    assert "BertForPreTraining" in done.err
    assert not (tmp_path / "adapter").exists()


def test_other_names_of_labels_are_no_obstacle(run_cli: Any, tmp_path: Path) -> None:
    for name, labels in (("before", "abc"), ("after", "xyz")):
        torch.manual_seed(0)
        config = small_bert(id2label=dict(enumerate(labels)))
        model = transformers.BertForSequenceClassification(config)
        if name == "after":
            torch.nn.init.normal_(model.classifier.weight)
        model.save_pretrained(tmp_path / name)
    done = extract(run_cli, tmp_path / "before", tmp_path / "after", tmp_path / "adapter")
    assert done.code == 0, done.err
    assert list(done.lines[0]["layers"]) == ["classifier"]


def test_statistics_of_batch_norms_are_told(run_cli: Any, tmp_path: Path) -> None:
    sizes = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
    config = transformers.ResNetConfig(**sizes, num_labels=2)
    model = transformers.ResNetForImageClassification(config)
    model.save_pretrained(tmp_path / "before")
    norm = "resnet.embedder.embedder.normalization"
    with torch.no_grad():
        model.classifier[1].weight += 1
        model.get_submodule(norm).running_mean += 1
    model.save_pretrained(tmp_path / "after")
    done = extract(run_cli, tmp_path / "before", tmp_path / "after", tmp_path / "adapter")
    assert done.code == 0, done.err
    assert done.lines[0]["left_out"] == [f"{norm}.running_mean"]


def test_problems_name_the_setting_and_keep_their_help(
    tiny_run: Any, merged: Path, run_cli: Any, tmp_path: Path
) -> None:
    adapter = tiny_run.path / "adapter"
    done = extract(run_cli, adapter, merged, tmp_path / "a")
    assert done.code == 2
    assert f"base=BASE; to use the adapter: lora-cli eval from={adapter}" in done.err
    assert "model.path" not in done.err
    broken = Path(shutil.copytree(merged, tmp_path / "broken"))
    (broken / "MANIFEST.json").unlink()
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if "query.weight" in name)
    del weights[name]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    done = extract(run_cli, tiny_run.base, broken, tmp_path / "a")
    assert done.code == 2
    assert "`tuned` must name a model" in done.err
    assert "model.path" not in done.err
    assert "minilm" not in done.err
