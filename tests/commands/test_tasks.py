"""The list of tasks says what composing each of them gives."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_cli.config.groups import group_options
from lora_cli.config.task_families import TASKS


def test_the_list_is_what_a_run_would_take(run_cli: Any, tmp_path: Path) -> None:
    done = run_cli("tasks", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    found = {entry["name"]: entry for entry in done.lines[0]["tasks"]}
    assert set(found) == set(group_options("task"))
    assert {entry["family"] for entry in found.values()} == set(TASKS)
    for name in ("stsb", "go_emotions", "msra_ner", "cola"):
        config = run_cli("train", "model=bert", f"task={name}", "--cfg", "job", cwd=tmp_path)
        task = yaml.safe_load(config.out)["task"]
        entry = found[name]
        assert (entry["family"], entry["metric"]) == (task["family"], task["metric"])
        assert (entry["data"], entry["configuration"]) == (
            task["data"]["path"],
            task["data"]["name"],
        )
        named = {k.removesuffix("_column"): v for k, v in task["data"].items() if "_column" in k}
        assert entry["columns"] == {k: v for k, v in named.items() if v is not None}


@pytest.mark.parametrize(
    ("words", "names"),
    [("chinese token", ["msra_ner"]), ("pearson glue", ["stsb"]), ("chunk_tags", ["chunks"])],
)
def test_words_find_tasks(run_cli: Any, tmp_path: Path, words: str, names: list[str]) -> None:
    done = run_cli("tasks", words, cwd=tmp_path)
    lines = [line for line in done.out.splitlines() if line.startswith("  ")]
    assert len(lines) == len(names)
    assert all(name in line for name, line in zip(names, lines, strict=True))
    assert done.out.splitlines()[0].split(":")[0] in TASKS


def test_nothing_found_is_an_error(run_cli: Any, tmp_path: Path) -> None:
    done = run_cli("tasks", "xyz", cwd=tmp_path)
    assert done.code == 2
    assert "tasks.none-found" in done.err
