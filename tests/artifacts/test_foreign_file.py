"""What is refused before any format is looked at, and what no format may leave out."""

from pathlib import Path

import pytest
import torch
from foreign_adapters import write_adapter

from lora_cli.artifacts.foreign_file import is_strength, read_foreign, split_pairs, unsupported
from lora_cli.errors import UserError

ONE = torch.ones(2, 3)


def problem(call: object, *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)  # type: ignore[operator]
    return "\n".join(f"{p.id}: {p.message} {p.fix}" for p in caught.value.problems)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    torch.save({"a": ONE}, tmp_path / "lora.pt")
    for path in (tmp_path, tmp_path / "lora.pt"):
        text = problem(read_foreign, path)
        assert text.startswith("convert.pickle")
        assert "torch.load('lora.pt', weights_only=True)" in text


def test_one_file_is_asked_for(tmp_path: Path) -> None:
    assert problem(read_foreign, tmp_path).startswith("convert.no-file")
    assert problem(read_foreign, tmp_path / "none").startswith("convert.no-file")
    write_adapter(tmp_path, {"x": ONE}, name="a.safetensors")
    assert read_foreign(tmp_path).config is None
    write_adapter(tmp_path, {"x": ONE}, {"r": 2}, name="b.safetensors")
    assert "a.safetensors, b.safetensors" in problem(read_foreign, tmp_path)
    assert read_foreign(tmp_path / "b.safetensors").config == {"r": 2}


def test_broken_files_are_named(tmp_path: Path) -> None:
    write_adapter(tmp_path, {"x": ONE, "y": torch.tensor([1.0, torch.nan])})
    text = problem(read_foreign, tmp_path)
    assert text.startswith("convert.not-finite")
    assert "is in y." in text
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * 9)
    assert problem(read_foreign, tmp_path).startswith("adapter.damaged")
    write_adapter(tmp_path, {"x": ONE})
    for content in ("[1]", "{", "[" * 5000):
        (tmp_path / "adapter_config.json").write_text(content)
        assert problem(read_foreign, tmp_path).startswith("adapter.bad-config")


def test_every_tensor_has_its_place(tmp_path: Path) -> None:
    names = ["m.a", "m.b", "n.a", "o.b", "m.extra", "m.alpha"]
    file = read_foreign(write_adapter(tmp_path, dict.fromkeys(names, ONE)))
    text = problem(lambda: split_pairs(file, ".a", ".b", others=["m.alpha"]))
    assert "lacks n.b, o.a" in text
    assert "also holds m.extra." in text
    assert problem(lambda: split_pairs(file, ".a", ".b")).count("m.alpha") == 1
    whole = read_foreign(write_adapter(tmp_path, dict.fromkeys(names[:2], ONE)))
    assert list(split_pairs(whole, ".a", ".b")) == ["m"]
    assert unsupported(whole, "be x", "it is y").problems[0].id == "convert.unsupported"


def test_a_strength_is_a_finite_number_above_zero() -> None:
    assert is_strength(1) and is_strength(0.5)  # noqa: PT018
    bad = [0, -1, True, "1", None, float("inf"), float("nan"), [1]]
    assert not any(map(is_strength, bad))
