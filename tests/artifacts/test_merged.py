"""The merged folder: what may be replaced, modes, and nothing left behind by a failed check."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_cli.artifacts.merged import check_output, folder_bytes, save_merged, write_merged
from lora_cli.errors import UserError


@pytest.fixture(scope="module")
def parts(tiny_model_dir: Callable[..., Path]) -> tuple[Any, Any]:
    folder = tiny_model_dir(dtype="bfloat16")
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    model.classifier.float()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_a_folder_that_transformers_loads(
    parts: tuple[Any, Any], tmp_path: Path, capfd: Any
) -> None:
    model, tokenizer = parts
    size = save_merged(model, tokenizer, tmp_path / "deep" / "m")
    assert capfd.readouterr() == ("", "")
    folder = tmp_path / "deep" / "m"
    assert size == folder_bytes(folder) == sum(p.stat().st_size for p in folder.iterdir())
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["classifier.weight"], model.classifier.weight.bfloat16())
    assert model.classifier.weight.dtype == torch.float32
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    words = ["a good film"]
    assert transformers.AutoTokenizer.from_pretrained(folder)(words) == tokenizer(words)


def test_more_tensors_are_written_as_the_others(parts: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = parts
    pooler = torch.randn(32, 32)
    tmp_path.joinpath("m").mkdir()
    more = {"pooler.dense.weight": pooler, "pooler.dense.bias": torch.ones(32)}
    write_merged(model.base_model, tokenizer, tmp_path / "m", more=more)
    loaded = transformers.BertModel.from_pretrained(tmp_path / "m")
    assert torch.equal(loaded.pooler.dense.weight, pooler.bfloat16())


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_modes_follow_the_umask(parts: tuple[Any, Any], tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_merged(*parts, tmp_path / "m")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}
    assert "model.safetensors" in modes


@pytest.mark.parametrize("existed", ["nothing", "model", "file"])
def test_a_failed_check_leaves_what_was_there(
    parts: tuple[Any, Any], tmp_path: Path, existed: str
) -> None:
    target = tmp_path / "m"
    if existed == "model":
        target.mkdir()
        (target / "config.json").write_text("old")
    elif existed == "file":
        target.write_text("old")
    seen = []

    def check(staged: Path) -> None:
        seen.append(sorted(path.name for path in staged.iterdir()))
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        save_merged(*parts, target, check=check)
    assert "model.safetensors" in seen[0]
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == {"nothing": [], "model": ["m", "m/config.json"], "file": ["m"]}[existed]

    save_merged(*parts, target)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (target / "config.json").read_text() != "old"


def refusal(path: Path, **options: Any) -> str | None:
    try:
        check_output(path, key="output", **{"overwrite": False, **options})
    except UserError as error:
        (problem,) = error.problems
        assert problem.key == "output"
        assert problem.fix
        return problem.message
    return None


def test_what_may_be_written_over(tmp_path: Path) -> None:
    for name in ("empty", "model", "photos"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "photos" / "cat.jpg").write_text("")
    (tmp_path / "file").write_text("")
    assert refusal(tmp_path / "new" / "deep") is None
    assert refusal(tmp_path / "empty") is None
    assert "exists" in (refusal(tmp_path / "model") or "")
    assert "exists" in (refusal(tmp_path / "file") or "")
    assert refusal(tmp_path / "model", overwrite=True) is None
    assert refusal(tmp_path / "file", overwrite=True) is None
    for overwrite in (True, False):
        assert "not a model" in (refusal(tmp_path / "photos", overwrite=overwrite) or "")
        found = refusal(tmp_path / "file" / "x", overwrite=overwrite)
        assert f"{tmp_path / 'file'} is a file" in (found or "")


def test_a_file_never_replaces_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for overwrite in (True, False):
        found = refusal(tmp_path / "model", overwrite=overwrite, is_file=True)
        assert "is a folder" in (found or "")
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "is a folder" in (refusal(tmp_path / "model", overwrite=True, is_file=True) or "")


def test_what_is_read_is_never_replaced(tmp_path: Path) -> None:
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(adapter)
    for path in (adapter, tmp_path / "run", tmp_path / "link"):
        found = refusal(path, overwrite=True, inputs=[adapter])
        assert "what the command reads" in (found or "")
    assert refusal(tmp_path / "run" / "merged", overwrite=True, inputs=[adapter]) is None


def test_size_of_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "sub" / "b").write_bytes(b"4567")
    assert folder_bytes(tmp_path) == 7
    assert folder_bytes(tmp_path / "a") == 3


def test_a_full_disk_is_told_as_one(tmp_path: Path) -> None:
    """Safetensors hides the error of the system in the text of its own."""
    code = """
import resource, sys
from pathlib import Path
from transformers import BertConfig, BertModel
from lora_cli.artifacts.merged import save_merged
model = BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
                             num_attention_heads=2, intermediate_size=16))
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    save_merged(model, None, Path(sys.argv[1]) / "merged")
except OSError as error:
    print(error.errno, error.filename)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"{errno.EFBIG} "), done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
