"""`lora-cli train`: every file of the run directory, repeating, stopping and resuming."""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

WEIGHTS = Path("adapter", "adapter_model.safetensors")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_every_file_of_the_run_directory_is_there(tiny_run: Any) -> None:
    step = {"adapter.safetensors", "optimizer.safetensors", "progress.json", "MANIFEST.json"}
    result = json.loads((tiny_run.path / "result.json").read_text())
    kept = {3, 4, result["best_step"]}
    expected = {
        ".lock",
        "recipe.yaml",
        "config.yaml",
        "data_report.json",
        "environment.json",
        "metrics.jsonl",
        "report.html",
        "result.json",
        "status.json",
        "predictions/validation.jsonl",
        *(f"adapter/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")),
        *(f"adapter/{name}" for name in ("lora_cli.json", "README.md")),
        *(f"checkpoints/step-{number:08d}/{name}" for number in kept for name in step),
    }
    # Other tests may have evaluated or merged the run.
    others = ("merged", "peft", "model.onnx", "predictions/test", "predictions/train")
    others += ("predictions/new",)
    found = {name for name in files(tiny_run.path) if not name.startswith(others)}
    assert found == expected


def test_the_result_holds_what_the_design_lists(tiny_run: Any) -> None:
    result = json.loads((tiny_run.path / "result.json").read_text())
    assert set(result) == {
        *("exit_code", "reason", "metric", "base", "adapter", "merged", "steps", "best_step"),
        *("seconds", "samples_per_second", "peak_rss_bytes"),
        *("trainable_parameters", "adapter_bytes"),
    }
    assert (result["exit_code"], result["reason"], result["steps"]) == (0, "finished", 4)
    metric = result["metric"]
    assert metric["split"] == "validation"
    assert metric["value"] == result["adapter"][metric["name"]]
    names = {"accuracy", "macro_f1", "matthews_correlation", "loss"}
    assert {*result["base"]} == {*result["adapter"]} == {*result["merged"]} == names
    assert result["merged"]["loss"] == pytest.approx(result["adapter"]["loss"], abs=1e-5)
    assert result["base"]["loss"] != pytest.approx(result["adapter"]["loss"], abs=1e-4)
    folder = tiny_run.path / "adapter"
    assert result["adapter_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    tensors = load_file(tiny_run.path / WEIGHTS)
    assert result["trainable_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert result["samples_per_second"] > 0
    assert result["peak_rss_bytes"] > 10**7


def test_metrics_and_predictions_agree_with_the_result(tiny_run: Any) -> None:
    result = json.loads((tiny_run.path / "result.json").read_text())
    lines = read_lines(tiny_run.path / "metrics.jsonl")
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 2, 3, 4]
    evaluations = {line["step"]: line["metrics"] for line in lines if line["event"] == "eval"}
    assert sorted(evaluations) == [0, 2, 4]
    assert evaluations[0] == result["base"]
    best = evaluations[result["best_step"]]
    assert best == pytest.approx(result["adapter"], abs=1e-6)
    values = [evaluations[number]["accuracy"] for number in (2, 4)]
    assert best["accuracy"] == max(values)
    predictions = read_lines(tiny_run.path / "predictions" / "validation.jsonl")
    rows = read_lines(tiny_run.data / "validation.jsonl")
    assert [line["reference"] for line in predictions] == [row["label"] for row in rows]
    right = sum(line["label"] == line["reference"] for line in predictions)
    assert right / len(rows) == result["adapter"]["accuracy"]
    assert all(sum(p["probabilities"].values()) == pytest.approx(1) for p in predictions)


def test_description_names_base_and_settings(tiny_run: Any) -> None:
    environment = json.loads((tiny_run.path / "environment.json").read_text())
    base = hashlib.sha256((tiny_run.base / "model.safetensors").read_bytes()).hexdigest()
    assert environment["base"]["sha256"] == base
    assert environment["seed"] == 42
    config = yaml.safe_load((tiny_run.path / "config.yaml").read_text())
    assert config["lora"]["r"] == 4
    assert config["lora"]["alpha"] == 16.0
    record = json.loads((tiny_run.path / "adapter" / "lora_cli.json").read_text())
    assert record["base"]["sha256"] == base
    assert record["state"]["labels"] == ["negative", "positive"]
    assert "<html" in (tiny_run.path / "report.html").read_text()
    recipe = yaml.safe_load((tiny_run.path / "recipe.yaml").read_text())
    assert "run" not in recipe


def test_messages_go_to_stderr_and_tables_to_stdout(tiny_run: Any) -> None:
    finished = tiny_run.finished
    assert re.search(r"adapter +\d\.\d{4}", finished.out)
    matched = r"^adapters: query: 2 layers \(0-1\), value: 2 layers \(0-1\)$"
    assert re.search(matched, finished.err, re.M)
    assert "whole: bert.pooler, classifier" in finished.err
    assert re.search(r"^step 4/4 +epoch 1\.00 +loss \d", finished.err, re.M)
    assert "run directory: runs/a" in finished.err
    assert "\x1b" not in finished.out + finished.err


def test_the_recipe_repeats_the_run_bit_for_bit(
    tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    finished = run_cli(
        *("train", tiny_run.path / "recipe.yaml", f"run.dir={tmp_path}/b=c", "--json"), cwd=tmp_path
    )
    assert finished.code == 0, finished.err
    assert sha256(tmp_path / "b=c" / WEIGHTS) == sha256(tiny_run.path / WEIGHTS)
    (result,) = finished.lines
    written = json.loads((tmp_path / "b=c" / "result.json").read_text())
    assert result == {"run": f"{tmp_path}/b=c", **written}
    recipes = [
        yaml.safe_load((p / "recipe.yaml").read_text()) for p in (tiny_run.path, tmp_path / "b=c")
    ]
    assert recipes[0] == recipes[1]


def test_the_seed_decides_every_new_tensor(tiny_run: Any, run_cli: Any, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(999)  # what this process drew before must not matter
    recipe, step = tiny_run.path / "recipe.yaml", ["trainer.max_steps=1", "optimizer.lr=1e-30"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finished = run_cli(
            "train", recipe, *step, f"seed={seed}", f"run.name={name}", "--quiet", cwd=tmp_path
        )
        assert (finished.code, finished.out, finished.err) == (0, "", "")
    a, b, c = (load_file(tmp_path / "runs" / name / WEIGHTS) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    drawn = {name for name in a if not name.endswith("bias") and "lora_B" not in name}
    assert len(drawn) == 6
    assert all(not torch.allclose(a[name], c[name], atol=1e-3) for name in drawn)


def test_overwrite_replaces_the_run_and_nothing_else(
    tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    shutil.copytree(tiny_run.path, tmp_path / "runs" / "a")
    stale, notes = (tmp_path / "runs" / "a" / name for name in ("adapter/stale", "notes.txt"))
    stale.write_text("")
    notes.write_text("mine")
    arguments = ("train", tiny_run.path / "recipe.yaml", "run.name=a", "trainer.max_steps=1")
    refused = run_cli(*arguments, cwd=tmp_path)
    assert refused.code == 2
    assert "error[run.exists]" in refused.err
    assert stale.exists()
    assert run_cli(*arguments, "--overwrite", cwd=tmp_path).code == 0
    assert not stale.exists()
    assert notes.read_text() == "mine"
    names = [path.name for path in (tmp_path / "runs" / "a" / "checkpoints").iterdir()]
    assert names == ["step-00000001"]


@pytest.mark.parametrize("kind", ["model", "data", "recipe"])
def test_overwrite_refuses_to_delete_its_own_inputs(
    tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("lora_cli.commands.train.prepare", lambda *_: pytest.fail("it was loaded"))
    run = tmp_path / "a"
    shutil.copytree(tiny_run.path, run)
    shutil.copytree(tiny_run.base, run / "merged", dirs_exist_ok=True)
    recipe = shutil.copy(run / "recipe.yaml", tmp_path)
    arguments: dict[str, list[object]] = {
        "model": [recipe, "model.path=a/merged"],
        "data": [recipe, "task.data.path=a/predictions/validation.jsonl"],
        "recipe": ["a/recipe.yaml"],
    }
    before = files(run)
    refused = run_cli("train", *arguments[kind], "run.dir=a", "--overwrite", cwd=tmp_path)
    assert refused.code == 2, refused.err
    assert "error[run.holds-input]" in refused.err
    assert files(run) == before


def test_resume_needs_the_same_configuration(tiny_run: Any, run_cli: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny_run.path, tmp_path / "a")
    before = {name: sha256(tmp_path / "a" / name) for name in files(tmp_path / "a")}
    arguments = ("train", tmp_path / "a" / "recipe.yaml", "run.dir=a", "--resume")
    refused = run_cli(*arguments, "seed=7", cwd=tmp_path)
    assert refused.code == 2
    assert "error[resume.other-config]" in refused.err
    after = {name: sha256(tmp_path / "a" / name) for name in files(tmp_path / "a")}
    assert {name for name in before if before[name] != after[name]} <= {".lock"}
    done = run_cli(*arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    assert sha256(tmp_path / "a" / WEIGHTS) == before[str(WEIGHTS)]


def start(arguments: list[str], *, cwd: Path, output: Path) -> int:
    """Run a command line in a forked process, which spares the seconds of importing."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.chdir(cwd)
        for number in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        import sys

        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from lora_cli.cli.main import main

        code = main(arguments)
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait_for(condition: Any, child: int) -> None:
    for _ in range(600):
        if condition():
            return
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended too soon"
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the run did not get there in time")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_usable_and_resumes_bit_for_bit(
    tiny_run: Any, run_cli: Any, tmp_path: Path, number: signal.Signals
) -> None:
    others = ("trainer.max_steps", "trainer.eval_steps", "trainer.save_steps")
    settings = [text for text in tiny_run.settings if not text.startswith(others)]
    settings += ["trainer.max_steps=40", "trainer.eval_steps=50", "trainer.save_steps=50"]
    whole = run_cli("train", *settings, "run.name=whole", "--quiet", cwd=tmp_path)
    assert whole.code == 0, whole.err
    output = tmp_path / "output.txt"
    child = start(["train", *settings, "run.dir=it's"], cwd=tmp_path, output=output)
    metrics = tmp_path / "it's" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"step": 2,' in metrics.read_text(), child)
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    text = output.read_text()
    assert os.waitstatus_to_exitcode(status) == 75, text
    assert f"{number.name}: saving after this step" in text
    stopped = json.loads((tmp_path / "it's" / "result.json").read_text())
    assert stopped["exit_code"] == 75
    # stopped before its first evaluation, so what is there is the state of the last step
    predicted = run_cli("predict", tmp_path / "it's", "text=a good film", cwd=tmp_path)
    assert predicted.code == 0, predicted.err

    (command,) = re.findall(r"fix: +lora-cli (.*)", text)
    resumed = run_cli(*shlex.split(command), cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert "resuming after step" in resumed.err
    for name in (WEIGHTS, Path("predictions", "validation.jsonl")):
        found, expected = (tmp_path / run / name for run in ("it's", "runs/whole"))
        assert found.read_bytes() == expected.read_bytes()
    lines = read_lines(metrics)
    assert [line["step"] for line in lines if line["event"] == "train"] == list(range(1, 41))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_a_signal_before_the_first_step_ends_as_without_us(
    tiny_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    status: int,
) -> None:
    from lora_cli.training.loop import Trainer

    monkeypatch.setattr(Trainer, "_evaluate", lambda _: os.kill(os.getpid(), number))
    output = tmp_path / "output.txt"
    child = start(["train", *tiny_run.settings, "run.name=a"], cwd=tmp_path, output=output)
    _, found = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(found) == status, output.read_text()
    assert not (tmp_path / "runs" / "a" / "checkpoints").exists()
