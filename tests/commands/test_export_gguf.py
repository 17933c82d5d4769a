"""`lora-cli export` of a decoder: GGUF files, adapters alone, folders for ollama, and refusals."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
import transformers
from tiny_llama import SENTENCES, byte_tokenizer, random_llama

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def run(run_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of a few steps on a tiny Llama with a byte-level tokenizer."""
    cwd = tmp_path_factory.mktemp("llama")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(cwd / "base")
    random_llama(len(tokenizer)).save_pretrained(cwd / "base")
    (cwd / "texts").mkdir()
    for split in ("train", "validation"):
        lines = [f"{number} {text.splitlines()[0]}\n" for number, text in enumerate(SENTENCES)]
        (cwd / "texts" / f"{split}.txt").write_text("".join(lines))
    finished = run_cli(
        "train",
        f"model.path={cwd / 'base'}",
        "task=causal_language_modeling",
        f"task.data.path={cwd / 'texts'}",
        "task.max_length=32",
        "lora=all-linear",
        "optimizer.lr=0.02",
        "trainer.max_steps=4",
        "run.name=a",
        cwd=cwd,
    )
    assert finished.code == 0, finished.err
    return SimpleNamespace(path=cwd / "runs" / "a", cwd=cwd)


def export(run_cli: Any, run: Any, *arguments: object) -> Any:
    finished = run_cli("export", run.path, *arguments, "--json", cwd=run.cwd)
    assert finished.code == 0, finished.err
    (result,) = finished.lines
    return SimpleNamespace(result=result, err=finished.err)


def test_a_float_file_says_what_the_merged_folder_says(
    run: Any, run_cli: Any, tmp_path: Path
) -> None:
    done = export(run_cli, run, "format=gguf", f"output={tmp_path}/m.gguf")
    assert done.result["rows"] == len(SENTENCES)
    assert done.result["max_abs_difference"] < 1e-3
    before, after = (done.result["metrics"][name] for name in ("adapter", "exported"))
    assert after == pytest.approx(before, rel=1e-4)
    assert run_cli("merge", run.path, f"output={tmp_path}/merged", cwd=run.cwd).code == 0
    ids = torch.randint(3, 400, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        load = transformers.AutoModelForCausalLM.from_pretrained
        expected = load(tmp_path / "merged")(ids).logits
        found = load(tmp_path, gguf_file="m.gguf", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert gguf.GGUFReader(str(tmp_path / "m.gguf")).fields["general.name"].contents() == "base"


def test_a_coarse_file_is_told_with_bound_and_metrics(
    run: Any, run_cli: Any, tmp_path: Path
) -> None:
    done = export(run_cli, run, "format=ollama", "gguf_type=q8_0", f"output={tmp_path}/o")
    assert 1e-4 < done.result["max_abs_difference"] <= done.result["bound"]
    before, after = (done.result["metrics"][name] for name in ("adapter", "exported"))
    assert 0 < abs(before["perplexity"] - after["perplexity"]) < 0.1 * before["perplexity"]
    assert "perplexity" in done.err
    folder = tmp_path / "o"
    assert {x.name for x in folder.iterdir()} == {"Modelfile", "model.gguf", "MANIFEST.json"}
    assert done.result["bytes"] == sum(x.stat().st_size for x in folder.iterdir())
    export(run_cli, run, "format=ollama", f"output={folder}", "--overwrite")


def test_an_adapter_alone(run: Any, run_cli: Any, tmp_path: Path) -> None:
    done = export(run_cli, run, "format=gguf-lora", f"output={tmp_path}/a.gguf")
    assert done.result["max_abs_difference"] < 1e-3
    reader = gguf.GGUFReader(str(tmp_path / "a.gguf"))
    assert reader.fields["general.type"].contents() == "adapter"
    assert len(reader.tensors) == 2 * 2 * 7


def refused(run_cli: Any, run: Any, tmp_path: Path, *arguments: object) -> str:
    output = tmp_path / "x"
    done = run_cli("export", run.path, *arguments, f"output={output}", cwd=run.cwd)
    assert done.code == 2, done.err
    assert list(tmp_path.iterdir()) == []
    text: str = done.err
    for part in ("set in:", "allowed:", "fix:"):
        assert part in text
    return text


@pytest.mark.parametrize("format_", ["onnx", "onnx-int8", "torch-export"])
def test_one_graph_of_a_decoder_is_refused(
    run: Any, run_cli: Any, tmp_path: Path, format_: str
) -> None:
    text = refused(run_cli, run, tmp_path, f"format={format_}")
    assert f"error[export.no-{format_}]" in text
    assert "a cache of keys and values" in text
    assert "allowed:  peft, hf, gguf, gguf-lora, ollama" in text


@pytest.mark.parametrize("format_", ["gguf", "gguf-lora", "ollama"])
def test_a_classifier_has_no_gguf_file(
    tiny_run: Any, run_cli: Any, tmp_path: Path, format_: str
) -> None:
    text = refused(run_cli, tiny_run, tmp_path, f"format={format_}")
    assert "a head that llama.cpp does not know" in text
    assert "allowed:  peft, hf, onnx, onnx-int8, torch-export" in text


def test_another_tokenizer_is_refused(
    run: Any, run_cli: Any, tmp_path: Path, tiny_language_dir: Callable[..., Path]
) -> None:
    base = tiny_language_dir("llama")
    settings = [
        f"model.path={base}",
        "lora=all-linear",
        "trainer.max_steps=1",
        "task.max_length=16",
    ]
    trained = run_cli(
        "train", *settings, "task=causal_language_modeling",
        f"task.data.path={run.cwd / 'texts'}", "run.name=b", cwd=run.cwd,
    )  # fmt: skip
    assert trained.code == 0, trained.err
    other = SimpleNamespace(path=run.cwd / "runs" / "b", cwd=run.cwd)
    text = refused(run_cli, other, tmp_path, "format=gguf")
    assert "is of the kind WordLevel" in text
    done = export(run_cli, other, "format=gguf-lora", f"output={tmp_path}/a.gguf")
    assert done.result["max_abs_difference"] < 1e-3


def test_a_number_format_of_another_format_is_refused(run: Any, run_cli: Any) -> None:
    done = run_cli("export", run.path, "format=gguf-lora", "gguf_type=f16", cwd=run.cwd)
    assert done.code == 2
    assert "gguf_type" in done.err
