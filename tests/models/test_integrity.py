"""What decides about a base besides its weights, and a merged model that is what was written."""

import hashlib
import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from lora_cli.config.groups import group_options, option_values
from lora_cli.errors import UserError
from lora_cli.models.integrity import (
    MANIFEST,
    changed_settings,
    check_manifest,
    hash_settings,
    write_manifest,
)
from lora_cli.models.sources import _HUB_FILES, resolve_model
from lora_cli.models.weights import hash_weight_files


@pytest.fixture
def folder(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(tiny_model_dir(), copy)
    return copy


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}))


def test_settings_count_by_their_values(folder: Path) -> None:
    before = hash_settings(folder)
    assert set(before) == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    content = (folder / "tokenizer.json").read_bytes()
    assert before["tokenizer.json"] == hashlib.sha256(content).hexdigest()
    # Saved again: another layout, another version.
    edit(folder / "config.json", transformers_version="99", _name_or_path="elsewhere")
    assert changed_settings(hash_settings(folder), before) == []
    edit(folder / "config.json", hidden_act="relu")
    (folder / "tokenizer.json").write_bytes(content.replace(b'"movie"', b'"nevio"'))
    assert changed_settings(hash_settings(folder), before) == ["config.json", "tokenizer.json"]
    (folder / "tokenizer_config.json").unlink()
    assert "tokenizer_config.json" in changed_settings(hash_settings(folder), before)


def test_a_vocabulary_counts_where_it_is_read(folder: Path) -> None:
    before = hash_settings(folder)
    (folder / "vocab.txt").write_text("other\n")
    assert hash_settings(folder) == before
    (folder / "tokenizer.json").unlink()
    assert "vocab.txt" in hash_settings(folder)


def test_every_file_of_the_tokenizers_of_our_models_is_fetched_and_counts(tmp_path: Path) -> None:
    kinds = {option_values("model", name)["model.architecture"] for name in group_options("model")}
    files = set()
    for kind in kinds:
        tokenizer = getattr(transformers, TOKENIZER_MAPPING_NAMES.get(kind) or "", None)
        files |= set(getattr(tokenizer, "vocab_files_names", {}).values())
    assert {"source.spm", "target.spm", "sentencepiece.bpe.model", "vocab.txt"} <= files
    assert all(any(fnmatch(name, pattern) for pattern in _HUB_FILES) for name in files)
    for name in files - {"tokenizer.json"}:
        (tmp_path / name).write_text("{}")
    assert set(hash_settings(tmp_path)) == files - {"tokenizer.json"}


@pytest.mark.parametrize("recorded", [None, {}, [], "x", 3])
def test_nothing_recorded_is_no_change(folder: Path, recorded: object) -> None:
    assert changed_settings(hash_settings(folder), recorded) == []


def problems(folder: Path) -> str:
    found = check_manifest(folder, key="merged", known=hash_weight_files(folder))
    return "".join(problem.message for problem in found)


def test_each_file_is_listed_and_compared(folder: Path) -> None:
    write_manifest(folder)
    listed = json.loads((folder / MANIFEST).read_bytes())["files"]
    names = {path.name for path in folder.iterdir()} - {MANIFEST}
    assert set(listed) == names
    for name, entry in listed.items():
        content = (folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (folder / "README.md").write_text("mine")
    assert problems(folder) == ""
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert f"{name} does not match its sha256" in problems(folder)
        (folder / name).write_bytes(content + b"\n")
        assert f"{name} has another size" in problems(folder)
        (folder / name).write_bytes(content)
    (folder / "vocab.txt").unlink()
    assert "vocab.txt is missing" in problems(folder)


def test_a_changed_model_is_refused_wherever_it_is_opened(folder: Path) -> None:
    write_manifest(folder)
    resolve_model(str(folder))
    edit(folder / "tokenizer_config.json", do_lower_case=False)
    with pytest.raises(UserError) as caught:
        resolve_model(str(folder))
    assert [problem.id for problem in caught.value.problems] == ["model.changed"]
    (folder / MANIFEST).unlink()
    resolve_model(str(folder))


@pytest.mark.parametrize(
    "text", ["{}", "[]", "3", '{"files": {"a": 1}}', '{"made_by": "another", "files": {"a": {}}}']
)
def test_a_manifest_of_others_is_theirs(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    assert problems(folder) == ""


def test_a_manifest_that_cannot_be_read_is_told(folder: Path) -> None:
    write_manifest(folder)
    content = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(content[: len(content) // 2])
    assert "MANIFEST.json cannot be read" in problems(folder)


def test_names_lead_nowhere_else(folder: Path) -> None:
    (folder.parent / "secret").write_text("x")
    write_manifest(folder)
    document = json.loads((folder / MANIFEST).read_bytes())
    document["files"]["../secret"] = {"sha256": "00", "bytes": 1}
    (folder / MANIFEST).write_text(json.dumps(document))
    assert "../secret is missing" in problems(folder)
