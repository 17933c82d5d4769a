"""Every strategy through the same commands: trained, resumed, evaluated, predicted, merged."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_cli.artifacts.commit import document_sha256
from lora_cli.training.loop import Trainer

SETTINGS = {
    "full": (),
    "head": (),
    "top": ("strategy.layers=1",),
    "bitfit": (),
    "lora_then_full": ("strategy.full_lr=1e-3", "lora.r=4", "lora.targets=[query,value]"),
    "adapter": ("strategy.size=8", "strategy.placement=houlsby"),
    "prefix": ("strategy.num_tokens=5",),
}
UNMERGEABLE = ("adapter", "prefix")
MERGEABLE = [name for name in SETTINGS if name not in UNMERGEABLE]
BATCH = {
    "input_ids": torch.tensor([[2, 11, 45, 30, 3]]),
    "attention_mask": torch.ones(1, 5, dtype=torch.long),
}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def settings_of(strategy: str, base: Path, data: Path) -> list[str]:
    return [
        f"model.path={base}",
        f"task.data.path={data}",
        "task.max_length=32",
        f"strategy={strategy}",
        *SETTINGS[strategy],
        "optimizer.lr=0.01",
        "trainer.max_steps=4",
        "trainer.global_batch_size=16",
        "trainer.eval_steps=2",
        "trainer.save_steps=1",
        "trainer.log_steps=1",
    ]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_run: Any, run_cli: Any
) -> Callable[[str], Path]:
    """Function: the run directory of a strategy, trained once."""
    cwd = tmp_path_factory.mktemp("strategies")

    def train(strategy: str) -> Path:
        path = cwd / strategy
        if not path.exists():
            settings = settings_of(strategy, tiny_run.base, tiny_run.data)
            done = run_cli("train", *settings, f"run.dir={path}", cwd=cwd)
            assert done.code == 0, done.err
        return path

    return train


@pytest.mark.parametrize("strategy", SETTINGS)
def test_a_run_says_what_it_has_trained_and_keeps_the_base_apart(
    strategy: str, trained: Any, tiny_run: Any
) -> None:
    path = trained(strategy)
    result = read_json(path / "result.json")
    # Whatever is added to the model: the first row is the base with its new head.
    assert result["base"] == read_json(tiny_run.path / "result.json")["base"]
    assert result["steps"] == (8 if strategy == "lora_then_full" else 4)
    assert result["adapter"]["loss"] != result["base"]["loss"]
    files = {entry.name for entry in (path / "adapter").iterdir()}
    peft_files = {"adapter_config.json", "adapter_model.safetensors"}
    own = peft_files if strategy == "prefix" else {"tuned.safetensors"}
    assert files == {"README.md", "lora_cli.json", *own}
    if strategy in UNMERGEABLE:
        assert result["merged"] is None
    else:
        assert result["merged"] == pytest.approx(result["adapter"], abs=1e-5)
    assert result["adapter_bytes"] == sum(
        entry.stat().st_size for entry in (path / "adapter").iterdir()
    )


@pytest.mark.parametrize("strategy", SETTINGS)
def test_eval_and_predict_say_what_the_run_said(
    strategy: str, trained: Any, run_cli: Any, tiny_run: Any, tmp_path: Path
) -> None:
    path = trained(strategy)
    result = read_json(path / "result.json")
    evaluated = run_cli("eval", path, "split=validation", "--json", cwd=tmp_path)
    assert evaluated.code == 0, evaluated.err
    (found,) = evaluated.lines
    assert found["adapter"] == pytest.approx(result["adapter"], abs=1e-6)
    assert found["base"] == pytest.approx(result["base"], abs=1e-6)
    if strategy in UNMERGEABLE:
        assert found["merged"] is None
        shown = run_cli("eval", path, cwd=tmp_path)
        assert "not merged: a " in shown.err
        assert "merged: cannot be" in shown.out
    else:
        assert found["merged"] == pytest.approx(result["adapter"], abs=1e-5)
    rows = tiny_run.data / "validation.jsonl"
    predicted = run_cli("predict", path, f"input={rows}", cwd=tmp_path)
    assert predicted.code == 0, predicted.err
    written = read_lines(path / "predictions" / "validation.jsonl")
    for line, expected in zip(predicted.lines, written, strict=True):
        assert line["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6)


@pytest.mark.parametrize("strategy", MERGEABLE)
def test_the_merged_model_is_an_ordinary_one(
    strategy: str, trained: Any, run_cli: Any, tmp_path: Path
) -> None:
    path = trained(strategy)
    done = run_cli("merge", path, f"output={tmp_path / 'm'}", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.lines[0]["max_abs_difference"] < 1e-5
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    tuned = load_file(path / "adapter" / "tuned.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tuned.items())
    names = set(read_json(tmp_path / "m" / "config.json")["id2label"].values())
    assert names == {"negative", "positive"}


@pytest.mark.parametrize("strategy", UNMERGEABLE)
def test_what_cannot_be_merged_says_so(
    strategy: str, trained: Any, run_cli: Any, tmp_path: Path
) -> None:
    path, output = trained(strategy), tmp_path / "out"
    for arguments in (
        ("merge", path, f"output={output}"),
        ("export", path, "format=hf", f"output={output}"),
        ("export", path, "format=onnx", f"output={output}"),
        ("eval", path, f"merged={path}/none"),
    ):
        done = run_cli(*arguments, "check_rows=0" * (arguments[0] == "merge"), cwd=tmp_path)
        assert done.code == 2, arguments
        assert not output.exists()
    done = run_cli("merge", path, f"output={output}", cwd=tmp_path)
    assert "error[merge.impossible]" in done.err
    assert f"strategy={strategy} cannot" in done.err
    refused = run_cli("train", f"adapter={path}", "adapter_mode=merge",
                      f"task.data.path={path}", cwd=tmp_path)  # fmt: skip
    assert refused.code == 2
    assert "error[merge.impossible]: `adapter` must be" in refused.err


@pytest.mark.parametrize("strategy", ["full", "adapter"])
def test_what_peft_cannot_load_is_not_exported_for_it(
    strategy: str, trained: Any, run_cli: Any, tmp_path: Path
) -> None:
    done = run_cli("export", trained(strategy), "format=peft", "output=out", cwd=tmp_path)
    assert done.code == 2
    assert "error[export.not-peft]" in done.err
    assert ("format=hf" in done.err.splitlines()[-1]) == (strategy == "full")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_peft_says_of_an_exported_prefix_what_we_say(
    trained: Any, run_cli: Any, tiny_run: Any, tmp_path: Path
) -> None:
    path = trained("prefix")
    assert run_cli("export", path, "format=peft", "output=out", cwd=tmp_path).code == 0
    base = AutoModelForSequenceClassification.from_pretrained(tiny_run.base, num_labels=2)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_run.base)
    done = run_cli("predict", path, "text=a good movie", cwd=tmp_path)
    with torch.no_grad():
        logits = model(**tokenizer("a good movie", return_tensors="pt")).logits
    probabilities = list(done.lines[0]["probabilities"].values())
    assert logits.softmax(-1)[0].tolist() == pytest.approx(probabilities, abs=1e-5)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, total: int) -> None:
    """Ask for a stop while the run trains its step after `total`, over all phases."""
    train_step, done = Trainer._train_step, [0]

    def step(self: Trainer) -> None:
        if done[0] == total:
            os.kill(os.getpid(), signal.SIGINT)
        done[0] += 1
        train_step(self)

    monkeypatch.setattr(Trainer, "_train_step", step)


# In the middle of a phase, and at both sides of the line between two.
STOPS = [
    ("full", 1),
    ("adapter", 1),
    ("prefix", 1),
    ("lora_then_full", 3),
    ("lora_then_full", 5),
    *(
        pytest.param(name, at, marks=pytest.mark.slow)
        for name, at in (
            ("head", 1),
            ("top", 1),
            ("bitfit", 1),
            ("lora_then_full", 1),
            ("lora_then_full", 4),
        )
    ),
]


@pytest.mark.parametrize(("strategy", "stop"), STOPS)
def test_a_resumed_run_is_the_run_that_never_stopped(
    strategy: str,
    stop: int,
    trained: Any,
    run_cli: Any,
    tiny_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = trained(strategy)
    settings = settings_of(strategy, tiny_run.base, tiny_run.data)
    with monkeypatch.context() as patch:
        interrupt_at(patch, stop)
        stopped = run_cli("train", *settings, "run.dir=a", cwd=tmp_path)
    assert stopped.code == 75, stopped.err
    assert f"everything up to step {stop + 1} is saved" in stopped.err
    resumed = run_cli("train", *settings, "run.dir=a", "--resume", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    path = tmp_path / "a"
    for entry in (whole / "adapter").iterdir():
        if entry.suffix == ".safetensors":
            assert (path / "adapter" / entry.name).read_bytes() == entry.read_bytes()
    last = max((whole / "checkpoints").iterdir())
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        found = path / "checkpoints" / last.name / name
        assert found.read_bytes() == (last / name).read_bytes(), name
    times = ("samples_per_second", "seconds", "peak_rss_bytes", "adapter_bytes", "crc32")
    lines, others = (read_lines(p / "metrics.jsonl") for p in (path, whole))
    results = [read_json(p / "result.json") for p in (path, whole)]
    for document in (*lines, *others, *results):
        for key in times:
            document.pop(key, None)
    assert lines == others
    assert results[0] == results[1]


def test_every_number_of_a_coarse_base_is_rounded_once(
    run_cli: Any, tiny_run: Any, tiny_model_dir: Any, tmp_path: Path
) -> None:
    base = tiny_model_dir(dtype="bfloat16")
    settings = settings_of("full", base, tiny_run.data)
    assert run_cli("train", *settings, "run.dir=a", cwd=tmp_path).code == 0
    assert run_cli("merge", "a", cwd=tmp_path).code == 0
    tuned = load_file(tmp_path / "a" / "adapter" / "tuned.safetensors")
    merged = load_file(tmp_path / "a" / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tuned.values()} == {torch.float32}
    assert tuned.keys() == merged.keys()
    for name, tensor in tuned.items():
        assert torch.equal(merged[name], tensor.bfloat16()), name
    # Steps too small for bfloat16 are not lost.
    assert any(not torch.equal(t, t.bfloat16().float()) for t in tuned.values())


def test_both_phases_are_told_of_and_kept(trained: Any, run_cli: Any, tmp_path: Path) -> None:
    path = trained("lora_then_full")
    result = read_json(path / "result.json")
    assert result["phases"] == [
        {"strategy": "lora", "steps": 4, "reason": "finished"},
        {"strategy": "full", "steps": 4, "reason": "finished"},
    ]
    lines = read_lines(path / "metrics.jsonl")
    assert [x["step"] for x in lines if x["event"] == "train"] == list(range(1, 9))
    assert [x["step"] for x in lines if x["event"] == "eval"] == [0, 2, 4, 6, 8]
    rates = [x["lr"] for x in lines if x["event"] == "train"]
    assert max(rates[:4]) == pytest.approx(0.01, rel=0.5)
    assert max(rates[4:]) <= 1e-3
    # The adapter of the first phase stands on its own.
    files = {entry.name for entry in (path / "adapter-lora").iterdir()}
    assert "adapter_config.json" in files
    rows = read_json(path / "adapter" / "lora_cli.json")["config"]["task"]["data"]["path"]
    assert rows is None
    data = f"task.data.path={read_recipe_data(path)}"
    done = run_cli("eval", path / "adapter-lora", data, "split=validation", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.lines[0]["adapter"] == pytest.approx(result["lora"], abs=1e-6)


def read_recipe_data(path: Path) -> str:
    import yaml

    return str(yaml.safe_load((path / "config.yaml").read_text())["task"]["data"]["path"])


def test_the_second_phase_starts_from_the_merged_adapter(
    run_cli: Any, tiny_run: Any, tmp_path: Path
) -> None:
    settings = settings_of("lora_then_full", tiny_run.base, tiny_run.data)
    slow = [s for s in settings if "full_lr" not in s] + ["strategy.full_lr=1e-7"]
    done = run_cli("train", *slow, "run.dir=a", cwd=tmp_path)
    assert done.code == 0, done.err
    result = read_json(tmp_path / "a" / "result.json")
    assert result["adapter"] == pytest.approx(result["lora"], abs=1e-4)
    assert result["adapter"] != result["base"]
    assert result["best_step"] <= 4


def test_tensors_of_another_strategy_are_refused(
    trained: Any, run_cli: Any, tmp_path: Path
) -> None:
    import shutil

    for strategy, other in (("bitfit", "head"), ("head", "lora"), ("prefix", "adapter")):
        folder = tmp_path / strategy
        shutil.copytree(trained(strategy) / "adapter", folder)
        record = read_json(folder / "lora_cli.json")
        record["config"]["strategy"] = {"name": other}
        signed = {**record, "sha256": document_sha256(record)}
        (folder / "lora_cli.json").write_text(json.dumps(signed))
        done = run_cli("predict", folder, "text=good", cwd=tmp_path)
        assert done.code == 2, done.err
        assert "error[adapter." in done.err


def test_prefix_and_rows_must_fit_the_positions(
    run_cli: Any, tiny_run: Any, tmp_path: Path
) -> None:
    settings = settings_of("prefix", tiny_run.base, tiny_run.data)
    longer = ["strategy.num_tokens=40" if "num_tokens" in s else s for s in settings]
    done = run_cli("train", *longer, "run.dir=a", cwd=tmp_path)
    assert done.code == 2
    assert "must be at most 24, the 64 positions of the model less the prefix" in done.err
    assert not (tmp_path / "a").exists()
