"""Where a run goes on from, what must be as it was, and what a full disk leaves."""

import errno
import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.artifacts.checkpoint import list_checkpoints
from lora_cli.commands.options import Options
from lora_cli.commands.restoring import (
    Resumption,
    expected_bytes,
    find_resumption,
    record_failure,
    rows_sha256,
    storage_errors_told,
)
from lora_cli.config.sections import RunConfig
from lora_cli.data.types import Row
from lora_cli.errors import RunFailedError, StorageError, UserError


def make_run(path: Path) -> Path:
    (path / "checkpoints" / "step-00000100").mkdir(parents=True)
    for name in ("config.yaml", "environment.json"):
        (path / name).write_text("{}")
    return path


def test_what_the_setting_and_the_flag_ask_for(tmp_path: Path) -> None:
    run, named = make_run(tmp_path / "a"), RunConfig(dir=str(tmp_path / "a"))
    new = tmp_path / "new"

    def ask(setting: str, config: RunConfig = named, **flags: bool) -> Resumption:
        return find_resumption(setting, config, Options(**flags))

    never, flag, auto = ask("never"), ask("never", resume=True), ask("auto")
    assert [never.applies(path) for path in (run, new)] == [False, False]
    # The flag asks for a run to be there, which is checked where the directory is.
    assert [flag.applies(path) for path in (run, new)] == [True, True]
    assert [auto.applies(path) for path in (run, new)] == [True, False]
    assert ask("auto", resume=True).applies(new)
    for config in (RunConfig(), named):
        assert ask(str(run), config).run == run
        found = ask(str(run / "checkpoints" / "step-00000100"), config)
        assert (found.run, found.checkpoint) == (run, run / "checkpoints" / "step-00000100")
        assert found.applies(run)


@pytest.mark.parametrize(
    ("setting", "config", "overwrite", "text"),
    [
        ("auto", RunConfig(name="x"), True, "never with --overwrite"),
        ("auto", RunConfig(), False, "without run.dir or run.name"),
        ("nowhere", RunConfig(), False, "the folder of a run or checkpoint"),
        ("a/checkpoints/step-00000200", RunConfig(), False, "the folder of a run or checkpoint"),
        ("a", RunConfig(name="b"), False, "name the run in runs/b"),
        ("a", RunConfig(dir="b"), False, "name the run in b"),
    ],
)
def test_what_contradicts_itself_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    config: RunConfig,
    overwrite: bool,
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a")
    with pytest.raises(UserError) as caught:
        find_resumption(setting, config, Options(overwrite=overwrite))
    (problem,) = caught.value.problems
    assert (problem.id, problem.key) == ("resume.setting", "trainer.resume")
    assert text in problem.message
    assert problem.fix


def row(number: int, **values: Any) -> Row:
    return Row(str(number), values, "train.jsonl", number)


def test_rows_are_told_apart_by_what_is_trained_on() -> None:
    rows = {"train": (row(1, text="a"), row(2, text="b")), "validation": (row(1, text="c"),)}
    same = rows_sha256(rows)
    assert rows_sha256({**rows, "test": (row(1, text="d"),)}) == same
    others = [
        {**rows, "train": (row(2, text="b"), row(1, text="a"))},
        {**rows, "train": (row(1, text="a"), row(2, text="B"))},
        {**rows, "train": (row(1, text="a"), row(3, text="b"))},
        {**rows, "validation": ()},
        {"train": (*rows["train"], *rows["validation"]), "validation": ()},
    ]
    assert len({same, *map(rows_sha256, others)}) == 6
    # What is no text counts by its kind, since its description may hold a place in memory.
    pictures = [{"train": (row(1, image=object()),)} for _ in range(2)]
    assert rows_sha256(pictures[0]) == rows_sha256(pictures[1])


def test_the_size_of_a_checkpoint_is_that_of_what_is_trained() -> None:
    model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.Linear(20, 5, dtype=torch.float64))
    model[0].weight.requires_grad = False
    tensors = 3 * (20 * 5 + 5) * 8
    assert tensors + 3 * 2 * 300 < expected_bytes(model) < tensors + 20_000


def test_errors_of_the_disk_say_what_is_safe_and_others_pass(tmp_path: Path) -> None:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG):
        with pytest.raises(StorageError) as caught, storage_errors_told(tmp_path / "a"):
            raise OSError(number, os.strerror(number), "file")
        assert "nothing is saved yet" in str(caught.value)
        assert os.strerror(number) in str(caught.value)
        fix = str(caught.value.problems[0].fix)
        assert ("limit of file size" in fix) == (number == errno.EFBIG)
        assert ("free some space" in fix) == (number != errno.EFBIG)
    with pytest.raises(FileNotFoundError), storage_errors_told(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "no")
    record_failure(tmp_path / "none", RunFailedError([]))


@pytest.mark.parametrize("place", [("committed", 3), ("commit", 4), ("rotate", 1)])
def test_a_full_disk_in_the_middle_of_a_run(
    tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any
) -> None:
    """From some place on no file can grow; what was saved is whole, and the run goes on later."""
    import importlib.util

    file = Path(__file__).parents[1] / "faults" / "forked.py"
    spec = importlib.util.spec_from_file_location("forked_for_restoring", file)
    assert spec is not None
    assert spec.loader is not None
    forked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(forked)

    def fill(found: Any) -> None:
        if found == place:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))

    arguments = ["train", *tiny_run.settings, "run.dir=a"]
    # The output of the command is a file as well.
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        forked.at_places(fill)
        from lora_cli.cli.main import main

        os.chdir(tmp_path)
        code = main([*arguments, "--quiet"])
        sys.stderr.flush()
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    assert forked.wait(child) == 74, text
    assert text.count("error[io.run]") == 1
    assert "Traceback" not in text
    steps = list_checkpoints(tmp_path / "a" / "checkpoints")
    saved = f"everything up to step {max(steps)} is saved" if steps else "nothing is saved yet"
    assert saved in text
    assert "lora-cli train a/recipe.yaml run.dir=a --resume" in text
    assert forked.no_leftovers(tmp_path / "a")
    assert forked.committed_steps(tmp_path / "a") == set(steps)
    done = run_cli("train", "a/recipe.yaml", "run.dir=a", "--resume", cwd=tmp_path)
    assert done.code == 0, done.err
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tiny_run.path / name).read_bytes()


def test_auto_starts_continues_and_leaves_alone(
    tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    arguments = ("train", *tiny_run.settings, "trainer.resume=auto", "run.dir=a")
    started = run_cli(*arguments, cwd=tmp_path)
    assert started.code == 0, started.err
    assert "trainer" in (tmp_path / "a" / "recipe.yaml").read_text()
    assert "resume:" not in (tmp_path / "a" / "recipe.yaml").read_text()
    finished = run_cli(*arguments, cwd=tmp_path)
    assert "run is finished already" in finished.err
    (tmp_path / "a" / "result.json").unlink()
    (tmp_path / "a" / ".tmp-adapter-12345678").mkdir()
    resumed = run_cli(*arguments, cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert "resuming after step 4" in resumed.err
    assert not (tmp_path / "a" / ".tmp-adapter-12345678").exists()


def test_a_named_checkpoint_is_gone_on_from(tiny_run: Any, run_cli: Any, tmp_path: Path) -> None:
    """Also in a run that is finished."""
    shutil.copytree(tiny_run.path, tmp_path / "a")
    steps = list_checkpoints(tmp_path / "a" / "checkpoints")
    early = sorted(steps)[-2]
    settings = ("train", *tiny_run.settings)
    done = run_cli(*settings, f"trainer.resume={steps[early]}", cwd=tmp_path)
    assert done.code == 0, done.err
    assert f"resuming after step {early}" in done.err
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tiny_run.path / name).read_bytes()
    (later,) = (tmp_path / "a" / "checkpoints").glob(".later-step-*")
    assert later.name.startswith(f".later-step-{max(steps):08d}")
    (steps[early] / "progress.json").write_text("{}")
    damaged = run_cli(*settings, f"trainer.resume={steps[early]}", cwd=tmp_path)
    assert damaged.code == 2
    assert "error[resume.damaged-checkpoint]" in damaged.err
    assert steps[early].is_dir()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run_id"'])
def test_a_run_that_does_not_say_which_it_is_is_not_resumed(
    tiny_run: Any, run_cli: Any, tmp_path: Path, text: str
) -> None:
    shutil.copytree(tiny_run.path, tmp_path / "a")
    (tmp_path / "a" / "result.json").unlink()
    (tmp_path / "a" / "environment.json").write_text(text)
    done = run_cli("train", *tiny_run.settings, "run.dir=a", "--resume", cwd=tmp_path)
    assert done.code == 2
    assert "error[resume.damaged]" in done.err


def test_other_rows_are_refused(tiny_run: Any, run_cli: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_run.data, data)
    settings = [s for s in tiny_run.settings if not s.startswith("task.data.path=")]
    arguments = ("train", *settings, f"task.data.path={data}", "run.dir=a")
    assert run_cli(*arguments, cwd=tmp_path).code == 0
    (tmp_path / "a" / "result.json").unlink()
    lines = (data / "train.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    (data / "train.jsonl").write_text(
        "\n".join([json.dumps({**first, "text": first["text"] + " film"}), *lines[1:]]) + "\n"
    )
    done = run_cli(*arguments, "--resume", cwd=tmp_path)
    assert done.code == 2, done.err
    assert "error[resume.other-rows]" in done.err
