"""`lora.trainable_tokens` from training to every command that reads the adapter."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_cli.artifacts.commit import document_sha256

TOKENS = ("<ticker>", "good")
KEY = "base_model.model.bert.embeddings.word_embeddings.token_adapter.trainable_tokens_delta"
TEXTS = ["the <ticker> film was good", "a dull film", "<TICKER> <ticker>"]


@pytest.fixture(scope="module")
def run(
    run_cli: Any, tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    cwd = tmp_path_factory.mktemp("tokens")
    lines = {
        label: [
            {"text": f"a <ticker> {word} film number {index}", "label": label}
            for index, word in enumerate(words * 8)
        ]
        for label, words in (("up", ["good", "fine"]), ("down", ["bad", "dull"]))
    }
    rows = [row for pair in zip(*lines.values(), strict=True) for row in pair]
    (cwd / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = tiny_model_dir()
    settings = (
        f"model.path={base}",
        "task=text_classification",
        "task.data.path=rows.jsonl",
        "task.max_length=32",
        f"lora.trainable_tokens=[{','.join(TOKENS)}]",
        "lora.r=2",
        "optimizer.lr=0.02",
        "trainer.max_steps=4",
        "trainer.global_batch_size=8",
        "trainer.eval_steps=4",
        "trainer.save_steps=2",
    )
    finished = run_cli("train", *settings, "run.name=a", cwd=cwd)
    assert finished.code == 0, finished.err
    return cwd, base, finished, settings


def predict(run_cli: Any, cwd: Path, subject: str = "runs/a") -> list[list[float]]:
    stdin = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    finished = run_cli("predict", subject, cwd=cwd, stdin=stdin)
    assert finished.code == 0, finished.err
    return [list(line["probabilities"].values()) for line in finished.lines]


def test_rows_are_in_the_file_and_have_moved(run: Any) -> None:
    cwd, base, finished, _ = run
    folder = cwd / "runs" / "a" / "adapter"
    rows = safetensors.torch.load_file(folder / "adapter_model.safetensors")[KEY]
    assert rows.shape == (2, 32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    good = tokenizer.convert_tokens_to_ids("good")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {
        "bert.embeddings.word_embeddings": [len(tokenizer), good]
    }
    table = safetensors.torch.load_file(base / "model.safetensors")[
        "embeddings.word_embeddings.weight"
    ]
    assert not torch.equal(rows[1], table[good])
    assert "trained tokens: 2 rows of bert.embeddings.word_embeddings\n" in finished.err
    assert "multivariate" not in finished.err


@pytest.mark.filterwarnings("ignore")  # of PEFT, about transformers
def test_peft_computes_the_same(run_cli: Any, run: Any) -> None:
    cwd, base, _, _ = run
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(TOKENS))
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model.resize_token_embeddings(len(tokenizer))
    wrapped = peft.PeftModel.from_pretrained(model, cwd / "runs" / "a" / "adapter").eval()
    with torch.no_grad():
        logits = wrapped(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    expected = torch.tensor(predict(run_cli, cwd))
    torch.testing.assert_close(logits.softmax(-1), expected, atol=1e-5, rtol=0)


def test_merged_model_and_its_tokenizer_have_them(run_cli: Any, run: Any, tmp_path: Path) -> None:
    cwd, _, _, _ = run
    finished = run_cli("merge", "runs/a", f"output={tmp_path / 'm'}", cwd=cwd)
    assert finished.code == 0, finished.err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.convert_ids_to_tokens(len(tokenizer) - 1) == "<ticker>"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        logits = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    expected = torch.tensor(predict(run_cli, cwd))
    torch.testing.assert_close(logits.softmax(-1), expected, atol=1e-5, rtol=0)
    evaluated = run_cli("eval", "runs/a", f"merged={tmp_path / 'm'}", "--json", cwd=cwd)
    assert evaluated.code == 0, evaluated.err
    (result,) = evaluated.lines
    assert result["merged"] == pytest.approx(result["adapter"], abs=1e-5)


@pytest.mark.parametrize("layout", ["peft", "hf"])
def test_export(run_cli: Any, run: Any, tmp_path: Path, layout: str) -> None:
    cwd, _, _, _ = run
    finished = run_cli("export", "runs/a", f"format={layout}", f"output={tmp_path / 'e'}", cwd=cwd)
    assert finished.code == 0, finished.err


def test_a_resumed_run_ends_in_the_same_rows(run_cli: Any, run: Any) -> None:
    cwd, _, _, settings = run
    folder = cwd / "runs" / "b"
    finished = run_cli("train", *settings, "run.name=b", cwd=cwd)
    assert finished.code == 0, finished.err
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    (folder / "result.json").unlink()
    resumed = run_cli("train", *settings, "run.name=b", "--resume", cwd=cwd)
    assert resumed.code == 0, resumed.err
    assert "resuming after step 2" in resumed.err
    files = [cwd / "runs" / name / "adapter" / "adapter_model.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_another_record_is_refused(run_cli: Any, run: Any, tmp_path: Path) -> None:
    cwd, _, _, _ = run
    shutil.copytree(cwd / "runs" / "a" / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "lora_cli.json"
    record = json.loads(path.read_text())
    record["config"]["lora"]["trainable_tokens"] = ["<ticker>", "bad"]
    path.write_text(json.dumps({**record, "sha256": document_sha256(record)}))
    finished = run_cli("predict", str(tmp_path / "adapter"), "text=x", cwd=cwd)
    assert finished.code == 2
    assert "error[adapter.other-tokens]" in finished.err


def test_a_text_twice_is_refused(run_cli: Any, run: Any) -> None:
    cwd, _, _, settings = run
    others = [value for value in settings if "trainable_tokens" not in value]
    finished = run_cli("train", *others, "lora.trainable_tokens=[a,a]", "run.name=c", cwd=cwd)
    assert finished.code == 2
    assert "error[lora.bad-token]" in finished.err
    assert not (cwd / "runs" / "c").exists()


@pytest.mark.parametrize("mode", ["continue", "merge"])
def test_a_second_round(run_cli: Any, run: Any, mode: str) -> None:
    """The rows start where the first round left them, in the adapter or in the merged base."""
    cwd, _, _, _ = run
    finished = run_cli(
        *("train", "adapter=runs/a", f"adapter_mode={mode}", "task.data.path=rows.jsonl"),
        *("task.max_length=32", "trainer.max_steps=2", "optimizer.lr=0.02"),
        *("trainer.global_batch_size=8", f"run.name={mode}", "--json"),
        cwd=cwd,
    )
    assert finished.code == 0, finished.err
    (result,) = finished.lines
    before = json.loads((cwd / "runs" / "a" / "result.json").read_text())["adapter"]
    start = result["start"] if mode == "continue" else result["base"]
    assert start == pytest.approx(before, abs=1e-5)
    again = run_cli("eval", f"runs/{mode}", "split=validation", "--json", cwd=cwd)
    assert again.code == 0, again.err
    assert again.lines[0]["adapter"] == pytest.approx(result["adapter"], abs=1e-5)
    assert again.lines[0]["merged"] == pytest.approx(result["adapter"], abs=1e-5)


def test_with_a_phase_of_every_weight(run_cli: Any, run: Any) -> None:
    cwd, base, _, settings = run
    more = ("strategy=lora_then_full", "strategy.full_lr=1e-3", "run.name=two", "--json")
    finished = run_cli("train", *settings, *more, cwd=cwd)
    assert finished.code == 0, finished.err
    (result,) = finished.lines
    tuned = safetensors.torch.load_file(cwd / "runs" / "two" / "adapter" / "tuned.safetensors")
    table = safetensors.torch.load_file(base / "model.safetensors")[
        "embeddings.word_embeddings.weight"
    ]
    assert tuned["bert.embeddings.word_embeddings.weight"].shape[0] == table.shape[0] + 1
    again = run_cli("eval", "runs/two", "split=validation", "--json", cwd=cwd)
    assert again.code == 0, again.err
    assert again.lines[0]["adapter"] == pytest.approx(result["adapter"], abs=1e-5)
    merged = run_cli("merge", "runs/two", "output=two", cwd=cwd)
    assert merged.code == 0, merged.err
    assert "<ticker>" in AutoTokenizer.from_pretrained(cwd / "two").get_vocab()
