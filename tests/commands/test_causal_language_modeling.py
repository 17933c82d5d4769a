"""Causal language modelling through every command, and what comes after it."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

PAIRS = (("good", "film"), ("bad", "city"), ("warm", "night"), ("dull", "day"))


def text(draw: random.Random) -> str:
    """Each adjective comes with a noun of its own, which can be learned."""
    words = ["the"]
    for _ in range(draw.randint(2, 14)):
        words += [*draw.choice(PAIRS), "and"]
    return " ".join(words[:-1])


@pytest.fixture(scope="module")
def run(
    run_cli: Any, tiny_language_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    cwd, draw = tmp_path_factory.mktemp("plain"), random.Random(3)
    data = cwd / "texts"
    data.mkdir()
    for split, count in (("train", 160), ("test", 24)):
        lines = [text(draw) + "\n" for _ in range(count)]
        lines[3:3] = ["\n", "   \n"]
        (data / f"{split}.txt").write_text("".join(lines))
    settings = (
        f"model.path={tiny_language_dir('llama')}",
        "task=causal_language_modeling",
        f"task.data.path={data}",
        "task.max_length=32",
        "lora=all-linear",
        "optimizer.lr=0.02",
        "trainer.epochs=5",
        "trainer.global_batch_size=16",
        "trainer.eval_steps=50",
    )
    finished = run_cli("train", *settings, "run.name=a", cwd=cwd)
    assert finished.code == 0, finished.err
    path = cwd / "runs" / "a"
    result = json.loads((path / "result.json").read_text())
    return SimpleNamespace(
        path=path,
        data=data,
        base=tiny_language_dir("llama"),
        settings=settings,
        result=result,
        said=finished,
    )


def test_training_learns_from_packed_rows(run: Any) -> None:
    base, adapter = run.result["base"], run.result["adapter"]
    assert set(adapter) == {"perplexity", "token_accuracy", "loss"}
    assert adapter["perplexity"] < 0.2 * base["perplexity"]
    assert adapter["perplexity"] == pytest.approx(math.exp(adapter["loss"]))
    assert run.result["merged"] == pytest.approx(adapter, abs=1e-4)
    assert "rows of at most 32 tokens" in run.said.err
    assert "train: packed: " in run.said.err
    card = (run.path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForCausalLM" in card


def test_merged_and_peft_say_the_same(run: Any, run_cli: Any, tmp_path: Path) -> None:
    merged = tmp_path / "m"
    done = run_cli("merge", run.path, f"output={merged}", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    done = run_cli("eval", run.path, f"merged={merged}", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.lines[0]["merged"] == pytest.approx(done.lines[0]["adapter"], abs=1e-3)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(merged)
    base = transformers.AutoModelForCausalLM.from_pretrained(run.base)
    wrapped = peft.PeftModel.from_pretrained(base, run.path / "adapter")
    assert wrapped.peft_config["default"].task_type == "CAUSAL_LM"
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids).logits for model in (wrapped, loaded)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)

    # The loss of eval is that of plain torch over the tokens of all texts.
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.base)
    total, count = 0.0, 0
    for line in (run.data / "test.txt").read_text().splitlines():
        if line.strip():
            ids = torch.tensor([[*tokenizer(line)["input_ids"], tokenizer.eos_token_id]])
            for start in range(0, ids.shape[1] - 1, 31):
                part = ids[:, start : start + 32]
                with torch.no_grad():
                    loss = float(wrapped(input_ids=part, labels=part).loss)
                total += loss * (part.shape[1] - 1)
                count += part.shape[1] - 1
    assert done.lines[0]["adapter"]["loss"] == pytest.approx(total / count, rel=1e-4)


def test_onnx_is_refused(run: Any, run_cli: Any, tmp_path: Path) -> None:
    done = run_cli("export", run.path, "output=model.onnx", cwd=tmp_path)
    assert done.code == 2
    assert "error[export.no-onnx]" in done.err
    assert not (tmp_path / "model.onnx").exists()


def test_texts_are_rated_and_continued(run: Any, run_cli: Any, tmp_path: Path) -> None:
    rows = "the good film and the bad\nthe good city\n"
    (tmp_path / "new.txt").write_text(rows)
    done = run_cli("predict", run.path, "input=new.txt", cwd=tmp_path)
    assert done.code == 0, done.err
    first, second = done.lines
    assert first["continuation"].startswith("city and")
    assert second["perplexity"] > first["perplexity"]
    assert second["tokens"] == 2
    done = run_cli("predict", run.path, "text=the warm", cwd=tmp_path)
    assert done.lines[0]["continuation"].startswith("night")


@pytest.mark.parametrize("mode", ["continue", "merge"])
def test_the_adapter_is_trained_on(run: Any, run_cli: Any, tmp_path: Path, mode: str) -> None:
    done = run_cli(
        "train", f"adapter={run.path}", f"adapter_mode={mode}", "task=causal_language_modeling",
        f"task.data.path={run.data}", "task.max_length=32", "trainer.max_steps=2",
        "trainer.global_batch_size=16", "run.dir=b", "--quiet", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    start = result["start" if mode == "continue" else "base"]
    assert start == pytest.approx(run.result["adapter"], abs=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gpt_neox"])
def test_other_decoders(
    run: Any, run_cli: Any, tiny_language_dir: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    settings = [s for s in run.settings if not s.startswith(("model.", "trainer."))]
    more = ("trainer.max_steps=4", "trainer.global_batch_size=16", "run.dir=b")
    done = run_cli("train", *settings, f"model.path={tiny_language_dir(kind)}", *more, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "train: packed: " in done.err
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    assert result["adapter"]["loss"] < result["base"]["loss"]


def test_a_prefix_is_trained_on_unpacked_rows(run: Any, run_cli: Any, tmp_path: Path) -> None:
    settings = [s for s in run.settings if not s.startswith(("lora", "trainer."))]
    more = ("strategy=prefix", "trainer.max_steps=2", "trainer.global_batch_size=16", "run.dir=b")
    done = run_cli("train", *settings, *more, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "not packed: the prefix" in done.err


def test_adalora_plans_over_the_packed_rows(run: Any, run_cli: Any, tmp_path: Path) -> None:
    settings = [s for s in run.settings if not s.startswith(("lora", "trainer."))]
    more = ("lora=adalora", "trainer.epochs=2", "trainer.global_batch_size=16", "run.dir=b")
    done = run_cli("train", *settings, *more, cwd=tmp_path)
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "b" / "adapter" / "adapter_config.json").read_text())
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    assert config["total_step"] == result["steps"]
