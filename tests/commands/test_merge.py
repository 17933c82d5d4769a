"""`lora-cli merge`: what is refused, and that a wrong merge is never written."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.lora.linear import LoraLinear
from lora_cli.lora.updates import LowRank


@pytest.fixture
def run(tiny_run: Any, tmp_path: Path) -> Path:
    ignore = shutil.ignore_patterns("merged", "*.onnx", "checkpoints")
    return Path(shutil.copytree(tiny_run.path, tmp_path / "a", ignore=ignore))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def no_update(change: LowRank, old: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """A merge that forgets the update: the bug that shipped elsewhere."""
    del change, start, stop
    return old


def wrong_merge(layer: LoraLinear) -> nn.Linear:
    """The same in memory."""
    plain = nn.Linear(layer.base_layer.in_features, layer.base_layer.out_features)
    plain.load_state_dict(layer.base_layer.state_dict())
    return plain


def test_the_default_place_is_the_run(run: Path, run_cli: Any) -> None:
    finished = run_cli("merge", run, cwd=run.parent)
    assert finished.code == 0, finished.err
    assert (run / "merged" / "model.safetensors").is_file()
    assert "merged against adapter on validation: 32 rows" in finished.err
    assert "same decision in 100.00 %" in finished.err
    again = run_cli("merge", run, cwd=run.parent)
    assert again.code == 2
    assert "error[output.exists]" in again.err
    assert run_cli("merge", run, "--overwrite", "--quiet", cwd=run.parent).code == 0


@pytest.mark.parametrize(
    "command", [["merge"], ["merge", "verify=layers"], ["export", "format=hf"], ["export"]]
)
def test_a_merge_that_differs_is_refused(
    run: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr(LoraLinear, "merged", wrong_merge)
    monkeypatch.setattr(LowRank, "rows", no_update)
    before = files(run.parent)
    finished = run_cli(command[0], run, *command[1:], cwd=run.parent)
    assert finished.code == 1
    assert f"error[{command[0]}.differs]" in finished.err
    assert "nothing was written" in finished.err
    assert files(run.parent) == before


def test_without_rows_tensors_are_compared(
    run: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LowRank, "rows", no_update)
    refused = run_cli("merge", run, "check_rows=0", "--json", cwd=run.parent)
    assert refused.code == 1
    assert "verify=layers, since check_rows is 0" in refused.err
    finished = run_cli("merge", run, "verify=none", "--json", cwd=run.parent)
    assert finished.code == 0
    assert set(finished.lines[0]) == {"output", "dtype", "bytes"}
    assert "against" not in finished.err


def test_a_failed_check_keeps_the_earlier_merge(
    run: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_cli("merge", run, cwd=run.parent).code == 0
    weights = (run / "merged" / "model.safetensors").read_bytes()
    monkeypatch.setattr(LowRank, "rows", no_update)
    assert run_cli("merge", run, "--overwrite", cwd=run.parent).code == 1
    assert (run / "merged" / "model.safetensors").read_bytes() == weights


def test_other_rows_for_the_check(run: Path, tiny_run: Any, run_cli: Any) -> None:
    rows = tiny_run.data / "test.jsonl"
    finished = run_cli(
        *("merge", run, f"task.data.path={rows}", "check_rows=5", "--json"), cwd=run.parent
    )
    assert finished.code == 0, finished.err
    assert finished.lines[0]["rows"] == 5


@pytest.mark.parametrize("command", ["merge", "export", "predict", "eval"])
@pytest.mark.parametrize("output", ["/proc/lora-cli-none/x", "/proc/x", "long"])
def test_an_output_that_cannot_be_made_is_no_bug(
    run: Path, run_cli: Any, command: str, output: str
) -> None:
    output = str(run.parent / ("x" * 300)) if output == "long" else output
    arguments = ["text=a good film"] if command == "predict" else []
    arguments += {"merge": ["verify=none"], "export": ["check_rows=0"]}.get(command, [])
    finished = run_cli(command, run, f"output={output}", *arguments, cwd=run.parent)
    assert finished.code in (2, 74), finished.err
    assert "error[output.unusable]" in finished.err
    assert "cannot be made" in finished.err
