"""Two processes with a GPU each, which add up their gradients by NCCL."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.multi_gpu


def train(cwd: Path, base: Path, data: Path, name: str, *more: str) -> dict[str, Any]:
    """Run `lora-cli train` in processes of its own, and return losses and result."""
    settings = (
        *(f"model.path={base}", "task=text_classification", f"task.data.path={data}"),
        *("lora.targets=[query,value]", "lora.dropout=0", "trainer.max_steps=6"),
        *("trainer.global_batch_size=8", "trainer.log_steps=1", f"run.name={name}", *more),
    )
    # What is given later counts.
    given = dict(setting.split("=", 1) for setting in settings)
    command = [sys.executable, "-m", "lora_cli", "train", *(f"{k}={v}" for k, v in given.items())]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = cwd / "runs" / name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [line["loss"] for line in lines if line["event"] == "train"],
        "result": json.loads((run / "result.json").read_bytes()),
        "device": json.loads((run / "environment.json").read_bytes())["device"],
    }


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_two_gpus_train_as_one(
    tiny_model_dir: Callable[..., Path], toy_reviews: Path, tmp_path: Path, precision: str
) -> None:
    # Masks of dropout differ between places of a row, so the base has none.
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir(), base)
    config = json.loads((base / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps(config))
    setting = f"trainer.precision={precision}"
    one = train(tmp_path, base, toy_reviews, "one", setting)
    two = train(tmp_path, base, toy_reviews, "two", setting, "distributed.num_processes=2")
    assert "cuda" in one["device"]
    assert "cuda" in two["device"]
    tolerance = 1e-4 if precision == "float32" else 2e-2
    assert two["losses"] == pytest.approx(one["losses"], rel=tolerance)
    ours, theirs = two["result"]["adapter"], one["result"]["adapter"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_base_that_is_spread_trains_as_a_whole_one(
    tiny_model_dir: Callable[..., Path], toy_reviews: Path, tmp_path: Path, precision: str
) -> None:
    """By NCCL, with a last step of the epoch that leaves the second process fewer passes."""
    more = (
        *(f"trainer.precision={precision}", "distributed.num_processes=2"),
        *("trainer.global_batch_size=6", "trainer.micro_batch_size=1", "trainer.max_steps=12"),
    )
    whole = train(tmp_path, tiny_model_dir(), toy_reviews, "whole", *more)
    spread = train(
        tmp_path, tiny_model_dir(), toy_reviews, "spread", *more, "distributed.shard_base=true"
    )
    tolerance = 1e-5 if precision == "float32" else 2e-2
    assert spread["losses"] == pytest.approx(whole["losses"], rel=tolerance)
    for form in ("adapter", "merged"):
        ours, theirs = spread["result"][form], whole["result"][form]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
