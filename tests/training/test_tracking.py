"""The real trackers: what they have on disk is read back by other means than their own writers.

Each writes two sessions of one run, from two processes, with a secret in the environment, on the
command line and in the configuration. Sockets that leave the machine are watched by strace, where
that is there, since a Go program is out of reach of the guard of the test suite.
"""

import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lora_cli.training.tracking import TrackedRun, _wandb_mode

SECRET = "hf_" + "CaNaRy" * 4
SESSION = """
import json, sys
from pathlib import Path
from lora_cli.config.redaction import redact
from lora_cli.training.events import EvalDone, RunStarted, StepDone
from lora_cli.training.runtime import Runtime
from lora_cli.training.trackers import Trackers
from lora_cli.training.tracking import TrackedRun

name, folder, first = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
Runtime(precision="float32", timeout=60)
ids = folder / "ids.json"
known = json.loads(ids.read_text()) if ids.exists() else {}
run = TrackedRun(
    folder=folder,
    project="films",
    name="first try",
    config={"lora.r": 4, "lora.dropout": 0.5, "lora.targets": "[query]", "run.name": None,
            "task.data.path": redact(sys.argv[4])},
    ids=dict(known),
    remember=known.__setitem__,
)
warnings = []
trackers = Trackers([name], run, warn=warnings.append)
trackers(RunStarted(first, 4, 2, 16))
if first == 0:
    trackers(EvalDone(0, {"accuracy": 0.5}, "accuracy", False))
for step in (first + 1, first + 2):
    trackers(StepDone(step, step / 2, 1 / step, 1e-3, 2.0, 99.5, True))
trackers(EvalDone(first + 2, {"accuracy": 0.75 + first / 16}, "accuracy", True))
trackers.close()
ids.write_text(json.dumps(known))
assert warnings == [], warnings
"""
LOSSES = {1: 1.0, 2: 0.5, 3: 1 / 3, 4: 0.25}
ACCURACIES = {0: 0.5, 2: 0.75, 4: 0.875}


def write_sessions(name: str, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for first in (0, 2):
        trace = folder.parent / f"connections-{first}"
        watch = ["strace", "-f", "-qq", "-e", "trace=connect", "-o", str(trace)]
        command = [sys.executable, "-c", SESSION, name, str(folder), str(first), SECRET]
        done = subprocess.run(
            [*(watch if shutil.which("strace") else []), *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env={**os.environ, "SOME_TOKEN": SECRET},
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        if trace.exists():
            far = [x for x in trace.read_text().splitlines() if "AF_INET" in x]
            assert [x for x in far if "127.0.0.1" not in x and '"::1"' not in x] == []


def check_no_secret(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def needs(*packages: str) -> Any:
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@needs("tensorboard")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    write_sessions("tensorboard", folder)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == pytest.approx(LOSSES)
    found = {event.step: event.value for event in events.Scalars("eval/accuracy")}
    assert found == ACCURACIES
    (settings,) = (folder / "tensorboard").rglob("hparams.yml")
    assert "lora.r: 4" in settings.read_text()
    check_no_secret(folder)


@needs("mlflow", "sqlalchemy", "alembic")
@pytest.mark.slow
def test_mlflow(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_sessions("mlflow", folder)
    with sqlite3.connect(folder / "mlruns" / "mlflow.db") as database:
        runs = database.execute("SELECT name, status FROM runs").fetchall()
        rows = database.execute("SELECT key, step, value FROM metrics").fetchall()
        settings = dict(database.execute("SELECT key, value FROM params").fetchall())
    # Both sessions are one run.
    assert runs == [("first try", "FINISHED")]
    assert {step: value for key, step, value in rows if key == "train/loss"} == LOSSES
    assert {step: value for key, step, value in rows if key == "eval/accuracy"} == ACCURACIES
    assert settings["lora.r"] == "4"
    assert settings["task.data.path"] == "[redacted]"
    check_no_secret(folder)


@needs("trackio")
@pytest.mark.slow
def test_trackio(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_sessions("trackio", folder)
    with sqlite3.connect(folder / "trackio" / "films.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert {name for name, _, _ in rows} == {"first try"}
    reports = [(step, json.loads(text)) for _, step, text in rows]
    assert {step: x["train/loss"] for step, x in reports if "train/loss" in x} == LOSSES
    assert {step: x["eval/accuracy"] for step, x in reports if "eval/accuracy" in x} == ACCURACIES
    check_no_secret(folder)


def logged(content: bytes) -> Iterator[bytes]:
    """Yield the records of a log in the layout of LevelDB, after a header of seven bytes."""
    block, place, part = 32768, 7, b""
    while len(content) - place > 7:
        if block - place % block < 7:
            place += block - place % block
            continue
        size, kind = struct.unpack_from("<HB", content, place + 4)
        part += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield part
            part = b""


@needs("wandb")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_without_a_login(tmp_path: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    folder = tmp_path / "run"
    write_sessions("wandb", folder)
    losses: dict[int, float] = {}
    runs, settings = set(), {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in logged(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.run.run_id:
                runs.add((record.run.run_id, record.run.project, record.run.display_name))
            items = [*record.config.update, *record.run.config.update]
            settings |= {x.key or x.nested_key[0]: x.value_json for x in items}
            values = {x.key or x.nested_key[0]: x.value_json for x in record.history.item}
            if "train/loss" in values:
                losses[int(values["_step"])] = float(values["train/loss"])
    assert losses == pytest.approx(LOSSES)
    ((_, project, name),) = runs
    assert (project, name) == ("films", "first try")
    assert settings["lora.r"] == "4"
    check_no_secret(folder)


@pytest.fixture
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_wandb_is_offline_unless_somebody_is_logged_in(
    no_login: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _wandb_mode() == "offline"
    no_login.write_text("machine api.wandb.ai login user password 0123\n")
    no_login.chmod(0o600)
    assert _wandb_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.example")
    assert _wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert _wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert _wandb_mode() == "offline"


def test_a_damaged_netrc_is_no_login(no_login: Path) -> None:
    no_login.write_text("machine api.wandb.ai {{{ what")
    assert _wandb_mode() == "offline"


def test_a_run_is_new_until_it_is_resumed(tmp_path: Path) -> None:
    run = TrackedRun(
        folder=tmp_path, project="p", name="n", config={}, ids={}, remember=lambda *_: None
    )
    assert run.is_new
    assert not run.resumed_after(1).is_new
