"""Classification of texts by decoders with a head, whichever side their tokenizer pads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KINDS = ("llama", "qwen2", "gpt2", "gpt_neox")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(
    run_cli: Any, tiny_run: Any, tiny_language_dir: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    """Both sides train alike, and a row is labelled as alone."""
    results, labelled = {}, {}
    for side in ("left", "right"):
        base = tmp_path / side
        shutil.copytree(tiny_language_dir(kind), base)
        path = base / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": side}))
        done = run_cli(
            "train", f"model.path={base}", "task=text_classification",
            f"task.data.path={tiny_run.data}", "task.max_length=48", "lora.dropout=0", "lora.r=4",
            "optimizer.lr=0.01", "trainer.max_steps=6", "trainer.global_batch_size=16",
            f"run.dir={side}-run", "--quiet", cwd=tmp_path,
        )  # fmt: skip
        assert done.code == 0, done.err
        results[side] = json.loads((tmp_path / f"{side}-run" / "result.json").read_text())
        stdin = (tiny_run.data / "test.jsonl").read_bytes()
        for size in (1, 7):
            arguments = (f"{side}-run", f"batch_size={size}")
            done = run_cli("predict", *arguments, cwd=tmp_path, stdin=stdin)
            assert done.code == 0, done.err
            labelled[side, size] = [line["probabilities"]["positive"] for line in done.lines]
    found = {name: results[name]["adapter"]["loss"] for name in results}
    assert found["left"] == pytest.approx(found["right"], rel=1e-3)
    assert results["left"]["merged"]["loss"] == pytest.approx(found["left"], rel=1e-3)
    for values in labelled.values():
        assert values == pytest.approx(labelled["right", 1], abs=2e-3)
    assert len({round(value, 4) for value in labelled["right", 1]}) > 10
