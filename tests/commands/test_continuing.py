"""Coming back with new rows: an adapter is trained on, or merged and built upon."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_cli.training.loop import Trainer

QUICK = (
    "task.max_length=32",
    "optimizer.lr=0.01",
    "trainer.max_steps=2",
    "trainer.global_batch_size=16",
    "trainer.log_steps=1",
)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_an_adapter_is_trained_on_with_its_own_settings(
    run_cli: Any, tiny_run: Any, rows: Any, tmp_path: Path
) -> None:
    """The base model and r=4 are the adapter's; nothing of it needs to be said again."""
    done = run_cli(
        "train", f"adapter={tiny_run.path}", f"task.data.path={rows()}", *QUICK,
        "lora.dropout=0.3", "model.dtype=float32", "run.dir=b",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "continuing " in done.err
    assert "lora.r=4" in done.err
    result, before = (read_json(p / "result.json") for p in (tmp_path / "b", tiny_run.path))
    lines = read_lines(tmp_path / "b" / "metrics.jsonl")
    assert [x["event"] for x in lines[:2]] == ["base", "eval"]
    assert lines[0]["metrics"] == result["base"]
    # Step 0 is the adapter as it was, and no base model.
    assert lines[1]["metrics"] == result["start"] != result["base"]
    record = read_json(tmp_path / "b" / "adapter" / "lora_cli.json")
    assert record["config"]["lora"]["r"] == 4
    assert record["config"]["lora"]["dropout"] == 0.3
    assert record["config"]["model"]["dtype"] == "float32", "what the user says of the model counts"
    assert record["base"] == read_json(tiny_run.path / "adapter" / "lora_cli.json")["base"]
    assert tensors(tmp_path / "b" / "adapter").keys() == tensors(tiny_run.path / "adapter").keys()
    assert before["adapter"] != result["adapter"]
    # On its own rows the start says what it said at the end of its run.
    same = run_cli(
        "eval", tiny_run.path, f"task.data.path={tmp_path / 'new'}", "split=validation", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert same.lines[0]["adapter"] == pytest.approx(result["start"], abs=1e-6)
    assert same.lines[0]["base"] == pytest.approx(result["base"], abs=1e-6)


def test_settings_that_contradict_the_adapter_are_all_named(
    run_cli: Any, tiny_run: Any, rows: Any, tmp_path: Path
) -> None:
    more = ["lora.r=8", "lora.targets=[key]", "lora.dropout=0.3", "lora.alpha=16"]
    done = run_cli(
        "train", f"adapter={tiny_run.path}", f"task.data.path={rows()}", *more, "run.dir=b",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 2
    assert "`lora.r` must be that of the adapter to be trained on (4), but is 8." in done.err
    assert "(query, value), but is key." in done.err.replace("[", "").replace("]", "")
    # Dropout is a matter of training, and alpha is the same.
    assert done.err.count("adapter.contradiction") == 2
    assert not (tmp_path / "b").exists()


def test_a_start_from_the_base_weight_goes_on_at_twice_the_rank(
    run_cli: Any, tiny_run: Any, rows: Any, tmp_path: Path
) -> None:
    settings = [s for s in tiny_run.settings if not s.startswith("trainer.max_steps")]
    made = run_cli(
        "train", *settings, "trainer.max_steps=2", "lora.init=pissa", "run.dir=a", cwd=tmp_path
    )
    assert made.code == 0, made.err
    done = run_cli(
        "train", "adapter=a", f"task.data.path={rows()}", *QUICK, "lora.r=4", "lora.init=pissa",
        "run.dir=b", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "lora.r=8" in done.err
    result = read_json(tmp_path / "b" / "result.json")
    told = run_cli(
        "eval", "a", f"task.data.path={tmp_path / 'new'}", "split=validation", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert told.lines[0]["adapter"] == pytest.approx(result["start"], abs=1e-5)
    assert read_json(tmp_path / "b" / "adapter" / "adapter_config.json")["r"] == 8


def test_labels_that_new_rows_lack_are_kept(
    run_cli: Any, tiny_run: Any, rows: Any, tmp_path: Path
) -> None:
    third = rows("third")
    for split in ("train", "validation"):
        path = third / f"{split}.jsonl"
        lines = read_lines(path)
        for line in lines[::3]:
            line["label"] = "mixed"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = (f"model.path={tiny_run.base}", f"task.data.path={third}", *QUICK)
    made = run_cli("train", *settings, "run.dir=a", cwd=tmp_path)
    assert made.code == 0, made.err
    done = run_cli(
        "train", "adapter=a", f"task.data.path={rows()}", *QUICK, "run.dir=b", cwd=tmp_path
    )
    assert done.code == 0, done.err
    assert "labels without a row in train, which cannot be learned: mixed" in done.err
    assert "starts anew" not in done.err
    record = read_json(tmp_path / "b" / "adapter" / "lora_cli.json")
    assert record["state"]["labels"] == ["mixed", "negative", "positive"]
    predicted = run_cli("predict", "b", "text=good", cwd=tmp_path)
    assert list(predicted.lines[0]["probabilities"]) == ["mixed", "negative", "positive"]
    found = run_cli("eval", "b", "--json", cwd=tmp_path)
    assert found.code == 0, found.err


@pytest.mark.parametrize("mode", ["continue", "merge"])
def test_other_labels_get_a_new_head(
    run_cli: Any, tiny_run: Any, rows: Any, tmp_path: Path, mode: str
) -> None:
    data = rows(positive="praise", negative="blame")
    done = run_cli(
        "train", f"adapter={tiny_run.path}", f"adapter_mode={mode}", f"task.data.path={data}",
        *QUICK, "run.dir=b", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "the head starts anew" in done.err
    assert "(negative, positive)" in done.err
    record = read_json(tmp_path / "b" / "adapter" / "lora_cli.json")
    assert record["state"]["labels"] == ["blame", "praise"]
    predicted = run_cli("predict", "b", "text=good", cwd=tmp_path)
    assert list(predicted.lines[0]["probabilities"]) == ["blame", "praise"]


def test_labels_in_another_order_are_refused(
    run_cli: Any, tiny_run: Any, rows: Any, tmp_path: Path
) -> None:
    done = run_cli(
        "train", f"adapter={tiny_run.path}", f"task.data.path={rows()}", *QUICK,
        "task.data.label_names=[positive,negative]", "run.dir=b", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 2
    assert "error[adapter.label-order]" in done.err
    assert "negative, positive" in done.err


def test_the_hash_that_the_user_expects_is_checked(
    run_cli: Any, tiny_run: Any, rows: Any, tmp_path: Path
) -> None:
    done = run_cli(
        "train", f"adapter={tiny_run.path}", f"task.data.path={rows()}",
        f"model.sha256={'0' * 64}", "run.dir=b", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 2
    assert "model.other-weights" in done.err
    assert not (tmp_path / "b").exists()


def test_another_base_is_refused(
    run_cli: Any, tiny_run: Any, tiny_model_dir: Any, rows: Any, tmp_path: Path
) -> None:
    other = tiny_model_dir(seed=1)
    for mode in ("continue", "merge"):
        done = run_cli(
            "train", f"model.path={other}", f"adapter={tiny_run.path}", f"adapter_mode={mode}",
            f"task.data.path={tiny_run.data}", *QUICK, "run.dir=b", cwd=tmp_path,
        )  # fmt: skip
        assert done.code == 2
        assert "error[adapter.other-base]" in done.err
        assert [entry.name for entry in tmp_path.iterdir()] == []


@pytest.mark.parametrize("mode", ["continue", "merge"])
def test_a_stopped_second_round_is_resumed_exactly(
    run_cli: Any,
    tiny_run: Any,
    rows: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    import os
    import signal

    settings = (f"adapter={tiny_run.path}", f"adapter_mode={mode}", f"task.data.path={rows()}")
    whole = run_cli("train", *settings, *QUICK, "trainer.save_steps=1", "run.dir=a", cwd=tmp_path)
    assert whole.code == 0, whole.err
    train_step = Trainer._train_step

    def step(self: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        train_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", step)
        stopped = run_cli(
            "train", *settings, *QUICK, "trainer.save_steps=1", "run.dir=b", cwd=tmp_path
        )
    assert stopped.code == 75, stopped.err
    resumed = run_cli("train", "b/recipe.yaml", "run.dir=b", "--resume", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    one, two = (tensors(tmp_path / name / "adapter") for name in "ab")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    results = [read_json(tmp_path / name / "result.json") for name in "ab"]
    for key in ("base", "start", "adapter"):
        assert results[0].get(key) == results[1].get(key)
    if mode == "merge":
        weights = tmp_path / "b" / "base" / "model.safetensors"
        (tmp_path / "b" / "result.json").unlink()
        damaged = bytearray(weights.read_bytes())
        damaged[-1] ^= 1
        weights.write_bytes(damaged)
        again = run_cli("train", "b/recipe.yaml", "run.dir=b", "--resume", cwd=tmp_path)
        assert again.code == 2
        assert "error[model.changed]" in again.err
        (tmp_path / "b" / "base" / "MANIFEST.json").unlink()
        again = run_cli("train", "b/recipe.yaml", "run.dir=b", "--resume", cwd=tmp_path)
        assert again.code == 2
        assert "error[model.other-weights]" in again.err


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["adapter=none"], "`adapter` must be a run or adapter directory, but"),
        (["adapter=."], "has no adapter_config.json or tuned.safetensors"),
    ],
)
def test_what_is_no_adapter_is_named(
    run_cli: Any, rows: Any, tmp_path: Path, arguments: list[str], found: str
) -> None:
    done = run_cli("train", *arguments, f"task.data.path={rows()}", "run.dir=b", cwd=tmp_path)
    assert done.code == 2
    assert found in done.err
    assert not (tmp_path / "b").exists()


def test_only_low_rank_updates_are_trained_on(
    run_cli: Any, tiny_run: Any, rows: Any, tmp_path: Path
) -> None:
    settings = [s for s in tiny_run.settings if not s.startswith(("lora", "trainer.max_steps"))]
    made = run_cli(
        "train", *settings, "strategy=bitfit", "trainer.max_steps=2", "run.dir=a", cwd=tmp_path
    )
    assert made.code == 0, made.err
    data = rows()
    done = run_cli("train", "adapter=a", f"task.data.path={data}", "run.dir=b", cwd=tmp_path)
    assert done.code == 2
    assert "error[adapter.cannot-continue]" in done.err
    assert "trained with strategy=bitfit" in done.err
    merged = run_cli(
        "train", "adapter=a", "adapter_mode=merge", f"task.data.path={data}", *QUICK, "run.dir=b",
        cwd=tmp_path,
    )  # fmt: skip
    assert merged.code == 0, merged.err
