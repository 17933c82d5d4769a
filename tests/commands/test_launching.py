"""Starting processes, and the exit code of a run from the way in which they ended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_cli.commands.launching import JOB, _outcome, must_launch, read_job, write_job
from lora_cli.commands.options import Options
from lora_cli.config.commands import TrainConfig
from lora_cli.config.composed import Composed
from lora_cli.config.distributed import DistributedConfig
from lora_cli.config.schema import to_plain
from lora_cli.errors import LoraCliError, StoppedError, UserError
from lora_cli.ranks import LAUNCH_FOLDER

PROBLEM = {
    "id": "a.b",
    "message": "`a` must be b, but is c.",
    "key": None,
    "where": None,
    "allowed": None,
    "fix": None,
}


def test_one_process_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not must_launch(DistributedConfig())
    assert must_launch(DistributedConfig(num_processes=2))
    assert must_launch(DistributedConfig(num_nodes=2))


def test_processes_that_were_started_start_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not must_launch(DistributedConfig())
    assert not must_launch(DistributedConfig(num_processes=2))
    with pytest.raises(UserError, match="the 2 that torchrun or accelerate has started, but is 3"):
        must_launch(DistributedConfig(num_processes=3))
    monkeypatch.setenv(LAUNCH_FOLDER, str(tmp_path))
    assert not must_launch(DistributedConfig(num_processes=2))


def test_a_job_comes_back_as_it_was(tmp_path: Path) -> None:
    config = TrainConfig(distributed=DistributedConfig(num_processes=2), seed=3)
    composed = Composed(
        command="train",
        config=config,
        plain=to_plain(config),
        user={"seed": 3},
        choices={"model": None},
        origins={"seed": "command line, seed=3"},
        job_number=4,
    )
    write_job(tmp_path / JOB, composed, Options(json=True))
    found, options = read_job(tmp_path / JOB)
    assert found == composed
    assert options == Options(json=True)


def outcome(
    folder: Path,
    codes: Mapping[int, int | Mapping[str, Any]],
    deaths: Mapping[int, int] | None = None,
    received: list[int] | None = None,
    restarts: Mapping[int, int] | None = None,
) -> int:
    """Return how a run ended whose processes left these notes and died of these codes."""
    counts = restarts or {}
    for rank, code in codes.items():
        note = code if isinstance(code, Mapping) else {"exit_code": code, "problems": [PROBLEM]}
        note = {"restarts": counts.get(rank, 0), **note}
        (folder / f"outcome-{rank}.json").write_text(json.dumps(note))
    for rank in range(2):
        started = {"restarts": max(counts.values(), default=0), "pid": 1}
        (folder / f"started-{rank}.json").write_text(json.dumps(started))
    failures = {
        rank: SimpleNamespace(timestamp=number, exitcode=code)
        for number, (rank, code) in enumerate((deaths or {}).items())
    }
    return _outcome(folder, failures, received or [])


def test_all_well(tmp_path: Path) -> None:
    assert outcome(tmp_path, {0: 0, 1: 0}) == 0


@pytest.mark.parametrize("code", [1, 2, 74, 75, 70])
def test_the_exit_code_is_that_of_the_rank_that_failed(tmp_path: Path, code: int) -> None:
    with pytest.raises(LoraCliError) as caught:
        outcome(tmp_path, {0: code, 1: 0}, {0: 1} if code == 70 else None)
    assert caught.value.exit_code == code
    assert caught.value.problems[0].id == "a.b"
    assert isinstance(caught.value, StoppedError) == (code == 75)


def test_a_killed_rank_is_named_with_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "rank1.log").write_text("step 3/9\n")
    lost = {"exit_code": 1, "problems": [PROBLEM], "lost": [1], "is_hung": False}
    with pytest.raises(LoraCliError) as caught:
        outcome(tmp_path, {0: lost}, {1: -9, 0: 1})
    assert caught.value.exit_code == 1
    message = caught.value.problems[0].message
    assert 'rank 1 was killed by SIGKILL; its last line: "step 3/9"' in message
    assert caught.value.problems[0].fix == "`--resume` goes on from the last checkpoint"


def test_a_killed_rank_comes_with_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "runs" / "a" / "logs" / "rank1.log"
    log.parent.mkdir(parents=True)
    log.touch()
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "rank1.log").symlink_to(log)
    for here, run in ((tmp_path, "runs/a"), (tmp_path / "launch", str(tmp_path / "runs" / "a"))):
        monkeypatch.chdir(here)
        with pytest.raises(LoraCliError) as caught:
            outcome(tmp_path / "launch", {}, {1: -9})
        expected = f"lora-cli train {run}/recipe.yaml run.dir={run} --resume"
        assert caught.value.problems[0].fix == expected


def test_a_hung_rank_is_named_and_not_the_kill_that_ended_it(tmp_path: Path) -> None:
    lost = {"exit_code": 1, "problems": [PROBLEM], "lost": [1], "is_hung": True}
    with pytest.raises(LoraCliError, match="rank 1 did not answer any more"):
        outcome(tmp_path, {0: lost}, {0: 1, 1: -9})


def test_a_rank_that_says_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoraCliError, match="rank 1 ended with exit code 3"):
        outcome(tmp_path, {0: 0}, {1: 3})


def test_what_was_before_a_restart_is_over(tmp_path: Path) -> None:
    assert outcome(tmp_path, {0: 1, 1: 0}, restarts={1: 1}) == 0


def test_an_interrupt_is_one_here_too(tmp_path: Path) -> None:
    note = {"exit_code": 130, "problems": []}
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            outcome(tmp_path, {0: note}, received=[signal.SIGINT])
    finally:
        signal.signal(signal.SIGINT, before)


def command(run: Any, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `lora-cli train` on the toy reviews, in a process of its own."""
    words = [sys.executable, "-m", "lora_cli", "train", *run.settings, *arguments]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_two_processes_make_one_run(tiny_run: Any, tmp_path: Path) -> None:
    done = command(tiny_run, tmp_path, "run.dir=a", "distributed.num_processes=2", "--json")
    assert done.returncode == 0, done.stderr
    # One result, from one process.
    result = json.loads(done.stdout)
    assert result["steps"] == 4
    assert done.stderr.count("training: 64 rows") == 1
    assert "step 4/4" in (tmp_path / "a" / "logs" / "rank1.log").read_text()
    # torchrun sees the same processes, and comes to the same bits.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m"]
    words = [*torchrun, "lora_cli", "train", *tiny_run.settings, "run.dir=b"]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    first, second = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in "ab"
    )
    assert first == second
    # What one process finds wrong is said once, with its own exit code.
    again = command(tiny_run, tmp_path, "run.dir=a", "distributed.num_processes=2")
    assert again.returncode == 2
    assert again.stderr.count("error[") == again.stderr.count("error[run.exists]") == 1


@pytest.mark.slow
def test_two_machines_meet(tiny_run: Any, tmp_path: Path) -> None:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    words = [sys.executable, "-m", "lora_cli", "train", *tiny_run.settings, "run.dir=a"]
    words += ["distributed.num_nodes=2", f"distributed.rendezvous=127.0.0.1:{port}"]
    agents = [
        subprocess.Popen(
            words,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ},
        )
        for _ in range(2)
    ]
    outputs = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert sum("training: 64 rows" in err for _, err in outputs) == 1
    assert json.loads((tmp_path / "a" / "result.json").read_bytes())["exit_code"] == 0
    assert (tmp_path / "a" / "logs" / "rank1.log").is_file()


def _process_of(cwd: Path, rank: int) -> int:
    """Return the id of the process of that rank, of the run that was started in `cwd`."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            variables = (place / "environ").read_bytes().split(b"\0")
            words = (place / "cmdline").read_bytes()
            is_here = (place / "cwd").readlink() == cwd
        except OSError:
            continue
        if is_here and b"lora_cli.cli.worker" in words and f"RANK={rank}".encode() in variables:
            return int(place.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize("is_asked", [True, False])
def test_only_a_run_that_is_asked_to_stop_says_that_it_saves(
    tiny_run: Any, tmp_path: Path, is_asked: bool
) -> None:
    others = ("trainer.max_steps", "trainer.eval_steps", "trainer.save_steps")
    settings = [text for text in tiny_run.settings if not text.startswith(others)]
    settings += ["trainer.max_steps=5000", "trainer.eval_steps=5000", "trainer.save_steps=5"]
    words = [sys.executable, "-m", "lora_cli", "train", *settings]
    words += ["run.dir=a", "distributed.num_processes=2"]
    run = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "a" / "checkpoints" / "step-00000005").exists():
            assert run.poll() is None, run.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.1)
        if is_asked:
            run.terminate()
        else:
            os.kill(_process_of(tmp_path, 1), signal.SIGKILL)
        _, text = run.communicate(timeout=60)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == (75 if is_asked else 1), text
    assert ("SIGTERM: saving" in text) == is_asked, text
    assert "lora-cli train a/recipe.yaml run.dir=a --resume" in text
