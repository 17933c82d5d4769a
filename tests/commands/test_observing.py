"""What others are told of a run, and that it is none of the secrets."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_cli.commands import observing as module
from lora_cli.commands.observing import IDS, observing, tracked_run
from lora_cli.config.commands import TrainConfig
from lora_cli.config.schema import to_plain
from lora_cli.config.sections import RunConfig, TrackingConfig
from lora_cli.training.events import RunStarted


def composed(**settings: Any) -> Any:
    config = TrainConfig(**settings)
    return SimpleNamespace(config=config, plain=to_plain(config))


def test_the_configuration_is_flat_and_without_secrets(tmp_path: Path) -> None:
    secret = "hf_" + "a" * 20
    run = tracked_run(
        tmp_path / "films",
        composed(
            run=RunConfig(name=secret),
            tracking=TrackingConfig(project=f"x {secret}"),
            tracker=("csv",),
        ),
    )
    assert secret not in json.dumps([run.project, run.name, dict(run.config)])
    assert run.config["run.name"] == "[redacted]"
    assert (run.config["lora.r"], run.config["tracker"]) == (8, "[csv]")
    assert all(isinstance(x, str | int | float | None) for x in run.config.values())
    assert run.name == "films"
    named = tracked_run(tmp_path, composed(tracking=TrackingConfig(name="mine")))
    assert (named.project, named.name) == ("lora-cli", "mine")


def test_what_trackers_call_the_run_is_remembered(tmp_path: Path) -> None:
    run = tracked_run(tmp_path, composed())
    assert run.ids == {}
    run.remember("wandb", "abc")
    run.remember("mlflow", "def")
    again = tracked_run(tmp_path, composed())
    assert again.ids == {"wandb": "abc", "mlflow": "def"}


@pytest.mark.parametrize("text", ["", "[1]", '{"wandb": 3}'])
def test_a_damaged_memory_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / IDS).write_text(text)
    assert tracked_run(tmp_path, composed()).ids == {}


def test_nothing_is_written_before_the_first_event(tmp_path: Path) -> None:
    with observing(tmp_path, composed(tracker=("csv",))) as tell:
        assert list(tmp_path.iterdir()) == []
        tell(RunStarted(0, 4, 2, 16))
        assert (tmp_path / "status.json").exists()
        assert (tmp_path / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("error", "seconds"), [(None, 30.0), (ValueError, 30.0), (KeyboardInterrupt, 1.0)]
)
def test_trackers_are_closed_however_the_run_ends(
    tmp_path: Path,
    error: type[BaseException] | None,
    seconds: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(module.Trackers, "close", lambda _, seconds: waited.append(seconds))
    if error is None:
        with observing(tmp_path, composed()):
            pass
    else:
        with pytest.raises(error), observing(tmp_path, composed()):
            raise error
    assert waited == [seconds]


def test_a_tracker_that_fails_is_a_warning_of_the_run(
    tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_cli.training import trackers

    def start(_: Any) -> Any:
        raise OSError("no space left on device")

    monkeypatch.setitem(trackers.OPENERS, "csv", start)
    done = run_cli("train", *tiny_run.settings, "tracker=csv", "run.dir=a", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.err.count("warning: tracker=csv is left out") == 1
    weights = Path("adapter", "adapter_model.safetensors")
    assert (tmp_path / "a" / weights).read_bytes() == (tiny_run.path / weights).read_bytes()


def test_a_run_is_recorded_and_overwritten_whole(
    tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    settings = [*tiny_run.settings, "tracker=csv", "trainer.max_steps=2", "run.dir=a"]
    settings.remove("trainer.max_steps=4")
    for flags in ((), ("--overwrite",)):
        done = run_cli("train", *settings, *flags, "--json", cwd=tmp_path)
        assert done.code == 0, done.err
        assert json.loads(done.out)["run"] == "a"
        lines = (tmp_path / "a" / "metrics.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines] == ["step", "0", "1", "2", "2"]


def test_a_missing_package_is_found_before_anything_is_written(
    tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_cli.training import trackers

    monkeypatch.setitem(trackers.PACKAGES, "wandb", ("no_such_package",))
    done = run_cli("train", *tiny_run.settings, "tracker=[csv,wandb]", "run.dir=a", cwd=tmp_path)
    assert done.code == 2
    assert "error[tracker.missing-extra]: `tracker` must name what is installed" in done.err
    assert "lora-cli[tracking]" in done.err
    assert not (tmp_path / "a").exists()
