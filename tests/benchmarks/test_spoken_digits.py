"""Generated speech: what is said and by whom, and where the runner finds it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def spoken(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script; each file that it would have said holds its settings."""
    module = script("spoken_digits")

    def say(folder: Path, name: str, *settings: Any) -> None:
        (folder / name).write_text(json.dumps(settings))

    monkeypatch.setattr(module, "_say", say)
    return module


def test_the_same_is_said_each_time_and_no_voice_of_test_is_trained_on(
    spoken: Any, tmp_path: Path
) -> None:
    said = []
    for name in ("a", "b"):
        spoken.write_sounds(tmp_path / name)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        said.append({str(path.relative_to(tmp_path / name)): path.read_text() for path in files})
    assert said[0] == said[1]
    voices: dict[str, set[str]] = {}
    for split, (count, _) in spoken.SPLITS.items():
        rows = [json.loads(line) for line in said[0][f"{split}.jsonl"].splitlines()]
        assert len(rows) == count
        settings = [json.loads(said[0][row["audio"]]) for row in rows]
        assert [row["text"] for row in rows] == [text for text, *_ in settings]
        assert all(set(row["text"].split()) <= set(spoken.DIGITS) for row in rows)
        voices[split] = {voice for _, voice, *_ in settings}
    assert not voices["train"] & voices["test"]


def test_the_runner_trains_on_it_or_says_what_is_missing(
    spoken: Any,
    script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    tasks: Any = script("tasks")
    written: list[Path] = []
    monkeypatch.setattr(tasks.spoken_digits, "write", written.append)
    args = tasks.parse_arguments(["--output", str(tmp_path / "results.json")])
    monkeypatch.setattr(tasks.spoken_digits, "is_there", lambda: False)
    with pytest.raises(tasks.RunError, match="espeak-ng is not installed"):
        tasks.train_arguments(args, "spoken_digits")
    assert not written
    monkeypatch.setattr(tasks.spoken_digits, "is_there", lambda: True)
    found = tasks.train_arguments(args, "spoken_digits")
    (folder,) = written
    assert f"model.path={folder / 'model'}" in found
    assert f"task.data.path={folder / 'sounds'}" in found
    assert folder != tasks.run_folder(args, "spoken_digits")
