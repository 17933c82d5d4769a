"""The run directory: names, refusals, the lock between processes, the metrics file."""

import json
import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from lora_cli.artifacts import run_dir
from lora_cli.artifacts.export import EXPORTERS
from lora_cli.artifacts.lock import locked
from lora_cli.artifacts.run_dir import (
    MetricsFile,
    check_inputs,
    check_run_dir,
    choose_run_dir,
    clear_run_dir,
    describe_environment,
    read_config,
    read_metrics,
    write_description,
    write_json,
)
from lora_cli.errors import UserError
from lora_cli.training.events import EvalDone, Event, RunStarted, StepDone


def make_run(path: Path) -> Path:
    path.mkdir(parents=True)
    write_description(path, recipe="{}\n", config="seed: 1\n", environment={"seed": 1})
    (path / "checkpoints" / "step-00000001").mkdir(parents=True)
    return path


def problem_of(path: Path, *, overwrite: bool = False, resume: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        check_run_dir(path, overwrite=overwrite, resume=resume)
    (problem,) = caught.value.problems
    assert problem.key == "run.dir"
    assert problem.fix
    return f"{problem.id}: {problem.message}"


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"task": "sst2", "model": "bert"}
    assert choose_run_dir(directory="/x/y=z", name=None, **options) == Path("/x/y=z")
    assert choose_run_dir(directory=None, name="n", **options) == Path("runs/n")
    assert choose_run_dir(directory=None, name="n", suffix="-3", **options) == Path("runs/n-3")

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Clock":
            return cls(2026, 3, 4, 5, 6, 7)

    monkeypatch.setattr(run_dir, "datetime", Clock)
    made = []
    for _ in range(3):
        made.append(choose_run_dir(directory=None, name=None, **options))
        made[-1].mkdir(parents=True)
    stem = "runs/sst2-bert-20260304-050607"
    assert made == [Path(stem), Path(f"{stem}-2"), Path(f"{stem}-3")]


def test_new_and_empty_directories_are_free(tmp_path: Path) -> None:
    check_run_dir(tmp_path / "new" / "deep", overwrite=False, resume=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".lock").write_text("process 1")
    check_run_dir(tmp_path / "empty", overwrite=False, resume=False)


def test_a_run_is_neither_overwritten_nor_resumed_by_accident(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    assert "run.exists" in problem_of(path)
    check_run_dir(path, overwrite=True, resume=False)
    check_run_dir(path, overwrite=False, resume=True)
    assert "run.nothing-to-resume" in problem_of(tmp_path / "none", resume=True)


def test_only_run_directories_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    assert "so it is not deleted" in problem_of(tmp_path / "home", overwrite=True)
    assert "something else than a run" in problem_of(tmp_path / "home")
    (tmp_path / "file").write_text("")
    assert "it is a file" in problem_of(tmp_path / "file", overwrite=True)
    assert f"{tmp_path / 'file'} is a file" in problem_of(tmp_path / "file" / "a")


def test_clearing_deletes_what_a_run_writes_and_nothing_else(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    for name in ("adapter", "predictions", ".tmp-adapter-12345678", ".trash-merged-12345678"):
        (path / name).mkdir()
        (path / name / "x").write_text("x")
    exports = [exporter.name for exporter in EXPORTERS.values()]
    for name in ("metrics.jsonl", "result.json", "report.html", "model.onnx.data", *exports):
        (path / name).write_text("x")
    (path / "data").mkdir()
    (path / "data" / "train.jsonl").write_text("mine")
    (path / "notes.txt").write_text("mine")
    with locked(path):
        clear_run_dir(path)
        names = {entry.name for entry in path.iterdir()}
    assert names == {".lock", "data", "notes.txt"}
    assert (path / "data" / "train.jsonl").read_text() == "mine"


def test_clearing_keeps_what_links_lead_to(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x").write_text("x")
    (path / "merged").symlink_to(tmp_path / "kept")
    clear_run_dir(path)
    assert list(path.iterdir()) == []
    assert (tmp_path / "kept" / "x").read_text() == "x"


def test_inputs_that_would_be_deleted_are_found(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    (path / "merged").mkdir()
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "model").symlink_to(path / "merged")
    (path / "model.onnx").symlink_to(tmp_path / "elsewhere")
    inside = ["a/merged", "a/merged/deep/x.jsonl", "link/merged", "model", "a/model.onnx"]
    inside.append("link/model.onnx")
    for name in inside:
        with pytest.raises(UserError) as caught:
            check_inputs(path, {str(tmp_path / name): "model.path"})
        (problem,) = caught.value.problems
        assert (problem.id, problem.key) == ("run.holds-input", "run.dir")
        assert str(tmp_path / name) in problem.message
        assert "model.path" in problem.message
    with pytest.raises(UserError) as caught:
        check_inputs(path, {str(path / "merged"): "x", str(path / "config.yaml"): "y"})
    assert len(caught.value.problems) == 2
    outside = ["a/data", "a", "merged", "elsewhere", "a/mergedx"]
    for text in [*(str(tmp_path / name) for name in outside), "bert-base", "pkg://a/merged"]:
        check_inputs(path, {text: "model.path"})


def step(number: int, *, log: bool = True) -> StepDone:
    return StepDone(number, number / 4, 0.5, 1e-3, 2.0, 100.0, log)


def test_metrics_are_kept_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    listener = MetricsFile(path, last_step=-1)
    events: list[Event] = [
        RunStarted(0, 4, 4, 64),
        EvalDone(0, {"accuracy": 0.5}, "accuracy", False),
    ]
    for event in [*events, step(1), step(2, log=False), step(3)]:
        listener(event)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        assert len(line.pop("crc32")) == 8
    assert lines == read_metrics(path)
    assert [(line["event"], line["step"]) for line in lines] == [
        ("eval", 0),
        ("train", 1),
        ("train", 3),
    ]
    assert lines[0]["metrics"] == {"accuracy": 0.5}
    assert lines[1]["lr"] == 1e-3


def test_a_resumed_run_drops_the_lines_that_it_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    listener = MetricsFile(path, last_step=-1)
    for number in range(1, 6):
        listener(step(number))
    with path.open("a") as file:
        file.write('{"event": "train", "st')
    listener = MetricsFile(path, last_step=3)
    listener(step(4))
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    MetricsFile(path, last_step=-1)
    assert path.read_text() == ""
    assert read_metrics(tmp_path / "none") == []


def test_no_flipped_bit_of_metrics_changes_what_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    listener = MetricsFile(path, last_step=-1)
    listener(EvalDone(0, {"accuracy": 0.5}, "accuracy", False))
    listener(step(1))
    whole, content = read_metrics(path), path.read_bytes()
    ends = [n for n, byte in enumerate(content) if byte == ord("\n")]
    for place in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            # A line that is not as it was written is left out, with those after it.
            kept = 0 if place <= ends[0] else 1
            assert read_metrics(path) == whole[:kept], (place, bit)
    assert "is damaged from line 1 on" in caplog.text


def test_description_and_environment(tmp_path: Path) -> None:
    base = {"name": "bert", "revision": None, "sha256": "f" * 64}
    environment = describe_environment(seed=7, device="cpu", base=base)
    write_description(tmp_path, recipe="a: ä\n", config="seed: 7\n", environment=environment)
    assert (tmp_path / "recipe.yaml").read_text(encoding="utf-8") == "a: ä\n"
    assert read_config(tmp_path / "config.yaml") == {"seed": 7}
    written = json.loads((tmp_path / "environment.json").read_text())
    assert written["base"] == base
    assert (written["seed"], written["device"]) == (7, "cpu")
    import torch

    assert written["packages"]["torch"] == torch.__version__


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "a: !!python/object/apply:os.getcwd []", "3"])
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert caught.value.problems[0].where == str(path)
    assert "must be readable" in caught.value.problems[0].message


def test_the_git_commit_is_that_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert describe_environment(seed=0, device="cpu", base={})["git_commit"] is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    found = describe_environment(seed=0, device="cpu", base={})["git_commit"]
    assert found == head.stdout.strip()


def test_json_keeps_every_character(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"label": "ärger \u2028 🎬"})
    assert json.loads((tmp_path / "x.json").read_bytes()) == {"label": "ärger \u2028 🎬"}
