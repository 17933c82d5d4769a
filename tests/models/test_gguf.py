"""Base models in GGUF files, against the model that was written into the file."""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file

from lora_cli.errors import UserError
from lora_cli.models import gguf as own
from lora_cli.models.architecture import load_architecture, resolve_config
from lora_cli.models.base import agree_on_padding, check_vocabulary, load_base, load_tokenizer
from lora_cli.models.gguf import find_gguf, is_gguf
from lora_cli.models.sources import ModelSource, resolve_model

_spec = importlib.util.spec_from_file_location(
    "gguf_file", Path(__file__).with_name("gguf_file.py")
)
assert _spec is not None
assert _spec.loader is not None
writing = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(writing)
tiny_llama, tokens, write_gguf = writing.tiny_llama, writing.tokens, writing.write_gguf

HEAD = {"auto_class": "AutoModelForSequenceClassification", "options": {"num_labels": 3}}


def load(path: Path, **changes: Any) -> Any:
    settings = {"dtype": "auto", "seed": 0, **HEAD, **changes}
    return load_base(resolve_model(str(path)), **settings)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama())
    return path


# Largest share of the largest weight of a block that its storage may change.
@pytest.mark.parametrize(("kind", "share"), [("F32", 0.0), ("F16", 2**-11), ("Q8_0", 1 / 200)])
def test_weights_are_those_of_the_file(tmp_path: Path, kind: str, share: float) -> None:
    model = tiny_llama()
    path = tmp_path / f"{kind}.gguf"
    write_gguf(path, model, kind=kind)
    base = load(path)
    assert base.new_keys == ("score.weight",)
    assert not base.model.is_quantized
    assert base.model.dtype == torch.float32
    expected = model.model.state_dict()
    assert base.model.model.state_dict().keys() == expected.keys()
    for name, value in base.model.model.state_dict().items():
        assert (value - expected[name]).abs().max() <= share * expected[name].abs().max()
    whole = load(path, auto_class="AutoModelForCausalLM", options={}).model
    ids = torch.tensor([[3, 9, 12, 5]])
    difference = (whole(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()
    assert difference <= 20 * share + 1e-6


def test_saved_as_a_folder_it_is_the_same_model(file: Path, tmp_path: Path) -> None:
    model = load(file).model
    tokenizer = load_tokenizer(resolve_model(str(file)))
    folder = tmp_path / "folder"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = load(folder)
    assert again.new_keys == ()
    ids = torch.tensor([[3, 9, 12, 2]])
    assert torch.equal(again.model(input_ids=ids).logits, model(input_ids=ids).logits)
    text = " good film bad plot"
    assert load_tokenizer(resolve_model(str(folder)))(text) == tokenizer(text)


def test_tokenizer_is_that_of_the_file(file: Path) -> None:
    source = resolve_model(str(file))
    tokenizer = load_tokenizer(source)
    pieces, _ = tokens()
    assert tokenizer(" good film").input_ids == [pieces.index("Ġgood"), pieces.index("Ġfilm")]
    assert tokenizer.eos_token == tokenizer.pad_token == "</s>"
    # transformers would add an end-of-text token, for which there is no embedding.
    assert len(tokenizer) == len(pieces)
    assert max(tokenizer("<|endoftext|> good").input_ids) < len(pieces)
    check_vocabulary(tokenizer, load(file).model, source)


def test_source_is_the_file(file: Path) -> None:
    source = resolve_model(str(file))
    assert source.folder == file.parent
    assert source.gguf == "tiny.gguf"
    assert source.revision is None
    assert source.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert source.place == file
    assert source.weights_bytes == file.stat().st_size
    (file.parent / "model.safetensors").write_bytes(b"of another model")
    assert source.weights_bytes == file.stat().st_size
    folder = ModelSource(file.parent, "folder", None, "")
    assert folder.place == file.parent
    assert folder.weights_bytes == 16


def test_model_learns_how_its_tokenizer_pads(file: Path) -> None:
    model = load(file).model
    tokenizer = load_tokenizer(resolve_model(str(file)))
    batch = tokenizer([" good film", " bad"], padding=True, return_tensors="pt")
    with pytest.raises(ValueError, match="no padding token"):
        model(**batch)
    agree_on_padding(tokenizer, model)
    alone = model(**tokenizer([" bad"], return_tensors="pt")).logits
    torch.testing.assert_close(model(**batch).logits[1:], alone)
    model.config.pad_token_id = 0
    agree_on_padding(tokenizer, model)
    assert model.config.pad_token_id == 0


def test_dtype_is_as_asked_for(file: Path) -> None:
    assert load(file, dtype="bfloat16").model.dtype == torch.bfloat16


def test_head_starts_by_the_seed(file: Path) -> None:
    first, same, other = (load(file, seed=seed).model.score.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_loading_shows_nothing(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(file)
    load_tokenizer(resolve_model(str(file)))
    assert capfd.readouterr() == ("", "")


def test_architecture_without_weights(file: Path) -> None:
    # Of another model in the same folder.
    save_file({"score.weight": torch.zeros(3, 32)}, file.parent / "model.safetensors")
    source = resolve_config(str(file))
    found = load_architecture(source, **HEAD)
    assert next(found.model.parameters()).is_meta
    assert found.new_keys == ("score.weight",)
    assert {name: value.shape for name, value in found.model.named_parameters()} == {
        name: value.shape for name, value in load(file).model.named_parameters()
    }


def error(path: Path) -> str:
    with pytest.raises(UserError) as info:
        load(path)
    assert info.value.problems[0].key == "model.path"
    return str(info.value)


def test_architecture_that_transformers_does_not_read(tmp_path: Path) -> None:
    path = tmp_path / "bert.gguf"
    writer = gguf.GGUFWriter(str(path), "bert")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "architecture bert is not supported" in error(path)


def test_truncated_file(file: Path) -> None:
    content = file.read_bytes()
    for length in (len(content) - 2000, 3000, 100, 20, 4):
        file.write_bytes(content[:length])
        assert "must name a model in a whole GGUF file" in error(file)


def test_incomplete_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = gguf.GGUFWriter.add_tensor

    def leave_out(self: Any, name: str, *args: Any, **kwargs: Any) -> None:
        if name != "blk.1.attn_q.weight":
            add(self, name, *args, **kwargs)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", leave_out)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama())
    assert "1 of its tensors are missing or of another shape, such as" in error(path)


def test_file_without_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama(), tokenizer=False)
    with pytest.raises(UserError, match="with a tokenizer that transformers can load"):
        load_tokenizer(resolve_model(str(path)))


def test_what_is_no_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"must name a GGUF file, but .* is of another format"):
        find_gguf(str(path), key="model.path")
    with pytest.raises(UserError, match="No such file"):
        find_gguf(str(tmp_path / "none.gguf"), key="model.path")


def test_folder_may_have_such_a_name(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").mkdir()
    assert not is_gguf(str(tmp_path / "x.gguf"))
    assert is_gguf(str(tmp_path / "y.GGUF"))
    assert is_gguf("pkg://package/model.gguf")
    assert not is_gguf("org/model-gguf")


def test_missing_package_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(own, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(UserError, match="package gguf is not installed") as info:
        resolve_model(str(file))
    assert info.value.problems[0].fix == 'pip install "lora-cli[gguf]"'
