"""Merging an adapter of a quantized base tells what both models score; test_quantized_runs.py
compares these numbers with those of training."""

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lora_cli.commands import quantized_scores

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def trained(
    tiny_model_dir: Run, run_cli: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run on a base in 4 bits, and its rows."""
    folder = tmp_path_factory.mktemp("quantized")
    rows = folder / "rows.csv"
    lines = [f"a {'good' if i % 2 else 'bad'} film {i},{i % 2}" for i in range(40)]
    rows.write_text("\n".join(["text,label", *lines]) + "\n")
    done = run_cli(
        "train",
        f"model.path={tiny_model_dir(hidden=64)}",
        "model.quantization=nf4",
        "task=text_classification",
        f"task.data.path={rows}",
        "task.max_length=16",
        "lora.r=2",
        "optimizer.lr=0.01",
        "trainer.max_steps=2",
        f"run.dir={folder / 'run'}",
        cwd=folder,
    )
    assert done.code == 0, done.err
    return folder / "run", rows


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_all_rows_that_are_named(
    dtype: str, trained: tuple[Path, Path], run_cli: Run, tmp_path: Path
) -> None:
    run, rows = trained
    words = [f"output={tmp_path / 'm'}", f"dtype={dtype}", "check_rows=3", "--json"]
    done = run_cli("merge", run, *words, f"task.data.path={rows}", cwd=tmp_path)
    assert done.code == 0, done.err
    result = done.lines[0]
    assert result["rows"] == 3
    scores = result["scores"]
    assert scores["rows"] == 40
    assert set(scores["quantized"]) == set(scores["merged"]) >= {"accuracy", "loss"}
    assert "nf4 base and adapter" in done.err
    assert "(40 rows)" in done.err


@pytest.mark.parametrize("way", ["layers", "none"])
def test_without_outputs_there_are_no_scores(
    way: str, trained: tuple[Path, Path], run_cli: Run, tmp_path: Path
) -> None:
    done = run_cli(
        "merge", trained[0], f"output={tmp_path / 'm'}", f"verify={way}", "--json", cwd=tmp_path
    )
    assert done.code == 0, done.err
    assert "scores" not in done.lines[0]
    assert "trained on weights in nf4; verify=logits shows the metrics" in done.err


def test_merging_needs_no_bitsandbytes(
    trained: tuple[Path, Path], run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained[0], tmp_path / "run")
    monkeypatch.setattr(
        quantized_scores,
        "find_spec",
        lambda name: None if name == "bitsandbytes" else find_spec(name),
    )
    done = run_cli("merge", tmp_path / "run", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "not compared with the base in nf4, since bitsandbytes is not installed" in done.err
    assert "scores" not in done.lines[0]


def test_whole_base_has_one_score(tiny_run: Any, run_cli: Run, tmp_path: Path) -> None:
    done = run_cli("merge", tiny_run.path, f"output={tmp_path / 'm'}", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "scores" not in done.lines[0]
