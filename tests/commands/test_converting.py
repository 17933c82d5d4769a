"""A base in a GGUF file is converted once, and stays the file for everything but loading."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.commands import converting
from lora_cli.commands.converting import as_folder
from lora_cli.models.base import load_base, load_tokenizer
from lora_cli.models.sources import resolve_model

_spec = importlib.util.spec_from_file_location(
    "gguf_file", Path(__file__).parents[1] / "models" / "gguf_file.py"
)
assert _spec is not None
assert _spec.loader is not None
writing = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(writing)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    writing.write_gguf(path, writing.tiny_llama())
    return path


def weights(source: Any) -> Any:
    settings: Any = {"auto_class": "AutoModelForCausalLM", "options": {}, "dtype": "auto"}
    return load_base(source, **settings, seed=0).model.state_dict()


def test_the_folder_holds_what_the_file_does(file: Path) -> None:
    source = resolve_model(str(file))
    found = as_folder(source)
    assert found.gguf is None
    assert found.folder != source.folder
    assert (found.sha256, found.name, found.settings) == (source.sha256, source.name, {})
    expected, loaded = weights(source), weights(found)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    texts = ["the film", "<s>a</s>"]
    tokens = [load_tokenizer(one)(texts)["input_ids"] for one in (source, found)]
    assert tokens[0] == tokens[1]


def test_it_is_made_once_and_again_where_it_is_damaged(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, made = resolve_model(str(file)), []
    convert = converting._convert
    monkeypatch.setattr(converting, "_convert", lambda *args: made.append(1) or convert(*args))
    first = as_folder(source)
    assert as_folder(source) == first
    assert len(made) == 1
    stored = first.folder / "model.safetensors"
    stored.write_bytes(stored.read_bytes()[:-4] + b"\0\1\2\3")
    assert as_folder(source) == first
    assert len(made) == 2
    weights(first)


def test_the_file_is_loaded_where_nothing_can_be_written(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "file"))
    source = resolve_model(str(file))
    assert as_folder(source) is source


def test_other_sources_stay_as_they_are(tiny_model_dir: Any) -> None:
    source = resolve_model(str(tiny_model_dir()))
    assert as_folder(source) is source


def test_a_run_records_the_file(file: Path, tmp_path: Path, run_cli: Any) -> None:
    rows = [{"text": f"the film {n}", "label": n % 2} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("task=text_classification", "task.data.path=rows.jsonl", "trainer.max_steps=1")
    more = (*settings, "task.max_length=16", f"model.path={file}")
    done = run_cli("train", *more, "run.dir=a", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "converting" in done.err
    done = run_cli("train", *more, "run.dir=b", cwd=tmp_path)
    assert "converting" not in done.err
    text = (tmp_path / "a" / "adapter" / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == str(file)
    done = run_cli("predict", "a", "text=the film", cwd=tmp_path)
    assert done.code == 0, done.err
