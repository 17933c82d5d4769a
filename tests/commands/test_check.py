"""`lora-cli check`: what it prints, and its exit codes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from stranger_adapters import write_adapter


def check(run_cli: Any, *words: object, cwd: Path) -> Any:
    return run_cli("check", *words, cwd=cwd)


def test_run_of_ours_and_a_folder_of_peft(tiny_run: Any, run_cli: Any, tmp_path: Path) -> None:
    done = check(run_cli, tiny_run.path, f"base={tiny_run.base}", "--json", cwd=tmp_path)
    assert done.code == 1, done.err
    result = done.lines[0]
    # It names its base by a path and has a head: PEFT reads both.
    assert result["for"] == {
        "peft": "warning",
        "transformers": "warning",
        "vllm": "error",
        "llama.cpp": "error",
    }
    assert result["adapter"] == str(tiny_run.path / "adapter")
    found = {finding["id"]: finding for finding in result["findings"]}
    assert set(found) == {
        "base.local",
        "head.labels",
        "vllm.whole",
        "llama.cpp.whole",
    }
    assert "0: 'negative', 1: 'positive'" in found["head.labels"]["fix"]
    assert result["errors"] == 2
    assert result["warnings"] == 2
    for finding in found.values():
        assert set(finding) == {"id", "severity", "for", "finding", "fix", "source"}


@pytest.mark.parametrize(
    ("fields", "runtimes", "code"),
    [
        ({}, "[peft,transformers,vllm,llama.cpp]", 0),
        ({"base_model_name_or_path": None}, "[peft]", 0),
        ({"use_rslora": True}, "[llama.cpp]", 1),
        ({"use_rslora": True}, "[vllm]", 0),
    ],
)
def test_exit_code(
    fields: dict[str, Any], runtimes: str, code: int, run_cli: Any, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "a", **fields)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = check(run_cli, folder, f"for={runtimes}", cwd=tmp_path)
    assert done.code == code, done.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_table_is_on_stdout_with_the_fix(run_cli: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", use_rslora=True)
    done = check(run_cli, folder, cwd=tmp_path)
    assert "rule: llama.cpp.rslora" in done.out
    assert 'fix: in a copy write "use_rslora": false and "lora_alpha": 16' in done.out
    assert "peft (0.21.2, tried): nothing found" in done.err
    assert "llama.cpp (convert_lora_to_gguf.py at commit 0b03adaa, read): would not" in done.err
    quiet = check(run_cli, folder, "--quiet", cwd=tmp_path)
    assert (quiet.code, quiet.out, quiet.err) == (1, "", "")


def test_shapes_of_a_base_without_weights(tiny_run: Any, run_cli: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((tiny_run.base / "config.json").read_text())
    config["hidden_size"] *= 2
    (base / "config.json").write_text(json.dumps(config))
    done = check(run_cli, tiny_run.path, f"base={base}", "for=[peft]", "--json", cwd=tmp_path)
    assert done.code == 1, done.err
    ids = {finding["id"] for finding in done.lines[0]["findings"]}
    assert {"base.sizes", "base.resized"} <= ids


def test_base_that_is_none(tiny_run: Any, run_cli: Any, tmp_path: Path) -> None:
    done = check(run_cli, tiny_run.path, "base=./nothing", cwd=tmp_path)
    assert done.code == 2
    assert "`base` must" in done.err
    assert "model.path" not in done.err


def test_adapter_of_another_strategy_and_a_broken_one(run_cli: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_config.json").write_text("{")
    done = check(run_cli, folder, "--json", cwd=tmp_path)
    assert done.code == 1
    assert [finding["id"] for finding in done.lines[0]["findings"]] == ["config.unreadable"]
    shutil.rmtree(folder)
    assert check(run_cli, folder, cwd=tmp_path).code == 2
    assert check(run_cli, cwd=tmp_path).code == 2
