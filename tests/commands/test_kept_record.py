"""An adapter of lora-cli in another rank, which every command reads as before."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from lora_cli.artifacts.adapter import load_adapter


def test_a_run_keeps_its_record(tiny_run: Any, convert: Any, run_cli: Any, tmp_path: Path) -> None:
    done = convert(tiny_run.path, "r=9", f"base={tiny_run.base}")
    assert done.code == 0, done.err
    assert done.lines[0]["format"] == "lora-cli"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a good movie"}\n{"text": "bad"}\n')
    found = []
    for adapter in (tiny_run.path, tmp_path / "out"):
        more = () if adapter == tiny_run.path else (f"base={tiny_run.base}",)
        ran = run_cli("predict", adapter, f"input={rows}", *more, cwd=tmp_path)
        assert ran.code == 0, ran.err
        lines = [json.loads(line) for line in ran.out.splitlines()]
        found.append([list(line["probabilities"].values()) for line in lines])
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    record = load_adapter(tmp_path / "out")[1]
    assert record.config["lora"]["r"] == 9
    assert (record.metrics, record.combined["method"]) == ({}, "convert")
    assert record.combined["adapters"][0]["adapter"] == tiny_run.path.name
