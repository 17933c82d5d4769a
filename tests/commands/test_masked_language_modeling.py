"""Masked language modelling through every command, and what comes after it."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

PAIRS = (("good", "film"), ("bad", "city"), ("warm", "night"), ("dull", "day"))
QUICK = ("optimizer.lr=0.01", "trainer.max_steps=2", "trainer.global_batch_size=16", "--quiet")


def text(draw: random.Random) -> str:
    """Each adjective comes with a noun of its own, which can be learned."""
    words = ["the"]
    for _ in range(draw.randint(2, 4)):
        words += [*draw.choice(PAIRS), "and"]
    return " ".join(words[:-1])


@pytest.fixture(scope="module")
def run(train_family: Callable[..., Any]) -> Any:
    """A run on plain .txt files, on a base without a head."""
    draw, files = random.Random(3), {}
    for split, count in (("train", 160), ("test", 24)):
        lines = [text(draw) + "\n" for _ in range(count)]
        lines[3:3] = ["\n", "   \n"]
        files[f"{split}.txt"] = "".join(lines)
    settings = ("task.max_length=16", "trainer.epochs=10", "trainer.eval_steps=50")
    return train_family("masked_language_modeling", files, *settings)


def test_training_learns_and_leaves_the_embeddings_alone(run: Any) -> None:
    base, adapter = run.result["base"], run.result["adapter"]
    assert set(adapter) == {"perplexity", "accuracy", "loss"}
    assert adapter["perplexity"] < 0.5 * base["perplexity"]
    assert adapter["perplexity"] == pytest.approx(math.exp(adapter["loss"]))
    assert run.result["merged"] == pytest.approx(adapter, abs=1e-4)
    assert "16 rows cut from train" in run.said.err, "blank lines are no rows"
    saved = load_file(run.path / "adapter" / "adapter_model.safetensors")
    whole = {name for name in saved if "lora_" not in name}
    head = "base_model.model.cls.predictions.transform"
    assert whole == {
        f"{head}.{name}"
        for name in ("dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias")
    }
    card = (run.path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForMaskedLM" in card


def test_all_forms_say_the_same(run: Any, run_cli: Any, tmp_path: Path) -> None:
    exported, merged = tmp_path / "model.onnx", tmp_path / "m"
    done = run_cli("export", run.path, f"output={exported}", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    done = run_cli("merge", run.path, f"output={merged}", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.lines[0]["agreement"] == 1
    forms = (f"merged={merged}", f"exported={exported}")
    done = run_cli("eval", run.path, *forms, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.lines[0]["rows"] == 24
    for form in ("merged", "exported"):
        assert done.lines[0][form] == pytest.approx(done.lines[0]["adapter"], abs=1e-3)

    auto_class = transformers.AutoModelForMaskedLM
    loaded, info = auto_class.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    before = transformers.AutoModel.from_pretrained(run.base).embeddings.word_embeddings.weight
    assert torch.equal(loaded.get_input_embeddings().weight, before), "the embeddings are frozen"
    wrapped = peft.PeftModel.from_pretrained(
        auto_class.from_pretrained(run.base), run.path / "adapter"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.base)
    inputs = tokenizer(["the good [MASK] and bad city", "a night"], padding=True)
    inputs = inputs.convert_to_tensors("pt")
    with torch.no_grad():
        logits = [model.eval()(**inputs).logits for model in (wrapped, loaded)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_masks_are_filled_and_other_texts_rated(run: Any, run_cli: Any, tmp_path: Path) -> None:
    texts = ["the good [MASK]  and the [MASK] city", "the good film", "the dull day and bad city"]
    rows = "".join(json.dumps({"text": one, "who": 1}) + "\n" for one in texts).encode()
    done = run_cli("predict", run.path, cwd=tmp_path, stdin=rows)
    assert done.code == 0, done.err
    first, *rated = done.lines
    assert (first["text"], first["who"], len(first["masks"])) == (texts[0], 1, 2)
    base = transformers.AutoModelForMaskedLM.from_pretrained(run.base)
    model = peft.PeftModel.from_pretrained(base, run.path / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.base)
    inputs = tokenizer(texts[0], return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits[0].softmax(-1)
    places = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten().tolist()
    for found, place in zip(first["masks"], places, strict=True):
        assert texts[0][found["start"] : found["end"]] == "[MASK]"
        values, numbers = probabilities[place].topk(5)
        assert [x["token"] for x in found["tokens"]] == tokenizer.convert_ids_to_tokens(numbers)
        assert [x["probability"] for x in found["tokens"]] == pytest.approx(values.tolist())
    for line in rated:
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
        assert line["masked_tokens"] == 1


def test_the_perplexity_of_eval_is_that_of_the_written_predictions(
    run: Any, run_cli: Any, tmp_path: Path
) -> None:
    done = run_cli("eval", run.path, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    written = (run.path / "predictions" / "test.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in written]
    total = sum(line["loss"] * line["masked_tokens"] for line in lines)
    count = sum(line["masked_tokens"] for line in lines)
    found = done.lines[0]["adapter"]
    assert found["perplexity"] == pytest.approx(math.exp(total / count))
    assert found["loss"] == pytest.approx(total / count)
    assert done.lines[0]["base"]["perplexity"] > found["perplexity"]


def test_a_stored_head_is_kept_frozen(run: Any, run_cli: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    done = run_cli("merge", run.path, f"output={base}", cwd=tmp_path)
    assert done.code == 0, done.err
    settings = [s for s in run.settings if not s.startswith(("model.", "optimizer", "trainer."))]
    done = run_cli("train", f"model.path={base}", *settings, *QUICK, "run.dir=b", cwd=tmp_path)
    assert done.code == 0, done.err
    saved = load_file(tmp_path / "b" / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved)
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    assert result["base"]["perplexity"] == pytest.approx(
        run.result["merged"]["perplexity"], rel=1e-3
    )


@pytest.mark.parametrize("mode", ["continue", "merge"])
def test_the_adapter_is_trained_on(run: Any, run_cli: Any, tmp_path: Path, mode: str) -> None:
    done = run_cli(
        "train", f"adapter={run.path}", f"adapter_mode={mode}", "task=masked_language_modeling",
        f"task.data.path={run.data}", "task.max_length=16", *QUICK, "run.dir=b", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    start = result["start" if mode == "continue" else "base"]
    assert start == pytest.approx(run.result["adapter"], abs=1e-3)


@pytest.fixture
def pooled(run: Any, tmp_path: Path) -> Path:
    """The base of the run with a pooler, which masked language modelling has no use for."""
    folder = tmp_path / "pooled"
    model = transformers.BertModel.from_pretrained(run.base, add_pooling_layer=True)
    torch.nn.init.constant_(model.pooler.dense.bias, 0.25)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(run.base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("has_pooler", [False, True])
def test_other_families_go_on_from_the_body(
    run: Any, run_cli: Any, pooled: Path, toy_reviews: Path, tmp_path: Path, has_pooler: bool
) -> None:
    """What both modes start from is the body that was trained, and the pooler of the base."""
    mlm = run.path
    if has_pooler:
        settings = [s for s in run.settings if not s.startswith(("model.", "trainer."))]
        more = (f"model.path={pooled}", "trainer.max_steps=4", "run.dir=mlm", "--quiet")
        done = run_cli("train", *settings, *more, cwd=tmp_path)
        assert done.code == 0, done.err
        mlm = tmp_path / "mlm"
    states = {}
    for mode in ("continue", "merge"):
        done = run_cli(
            "train", f"adapter={mlm}", f"adapter_mode={mode}", "task=text_classification",
            f"task.data.path={toy_reviews}", "task.max_length=32", *QUICK[:-1],
            "lora.targets=[query,value]", f"run.dir={mode}", cwd=tmp_path,
        )  # fmt: skip
        assert done.code == 0, done.err
        assert "the head starts anew, since the adapter's is of masked_language_modeling" in (
            done.err
        )
        states[mode] = json.loads((tmp_path / mode / "metrics.jsonl").read_text().splitlines()[
            1 if mode == "continue" else 0
        ])  # fmt: skip
        predicted = run_cli("predict", tmp_path / mode, "text=a good film", cwd=tmp_path)
        assert set(predicted.lines[0]["probabilities"]) == {"negative", "positive"}
    assert states["continue"]["step"] == states["merge"]["step"] == 0
    # The same body below the same new head.
    assert states["continue"]["metrics"] == pytest.approx(states["merge"]["metrics"], abs=1e-5)
    base = load_file(tmp_path / "merge" / "base" / "model.safetensors")
    assert ("pooler.dense.bias" in base) == has_pooler
    if has_pooler:
        assert torch.equal(base["pooler.dense.bias"], torch.full((32,), 0.25))
    merged = transformers.AutoModelForMaskedLM.from_pretrained(run.base)
    body = peft.PeftModel.from_pretrained(merged, mlm / "adapter").merge_and_unload().bert
    for name, tensor in body.state_dict().items():
        torch.testing.assert_close(base[name], tensor)


def test_the_other_way_round_is_refused(
    run: Any, run_cli: Any, tiny_run: Any, tmp_path: Path
) -> None:
    done = run_cli(
        "train", f"adapter={tiny_run.path}", "task=masked_language_modeling",
        f"task.data.path={run.data}", "run.dir=b", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 2
    assert "error[adapter.other-task]" in done.err
    assert not (tmp_path / "b").exists()


def test_tensors_without_a_place_in_the_body_are_refused(
    run: Any, run_cli: Any, tiny_run: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(run.path / "adapter", folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "layer.1" in name and "query.lora_A" in name)
    save_file({n: x for n, x in tensors.items() if n != name}, path, {"format": "pt"})
    done = run_cli(
        "train", f"adapter={folder}", "task=text_classification",
        f"task.data.path={tiny_run.data}", "run.dir=b", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 2
    assert "error[adapter." in done.err


def test_accumulation_does_not_change_the_masks(run: Any, run_cli: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(run.base, base)
    config = json.loads((base / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps(config))
    settings = [s for s in run.settings if not s.startswith(("model.", "optimizer", "trainer."))]
    losses = []
    for size in (16, 4):
        more = (*QUICK, "lora.dropout=0", f"trainer.micro_batch_size={size}", f"run.dir=m{size}")
        more = (*more, f"model.path={base}", "trainer.log_steps=1")
        done = run_cli("train", *settings, *more, cwd=tmp_path)
        assert done.code == 0, done.err
        lines = (tmp_path / f"m{size}" / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        losses.append([x["loss"] for x in found if x["event"] == "train"])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_smoothing_has_no_part_here(run: Any, run_cli: Any, tmp_path: Path) -> None:
    done = run_cli("train", *run.settings, "trainer.label_smoothing=0.1", "run.dir=b", cwd=tmp_path)
    assert done.code == 2
    assert "trainer.label_smoothing" in done.err
