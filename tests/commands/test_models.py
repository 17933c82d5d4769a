from pathlib import Path
from typing import Any

from lora_cli.config.groups import group_options


def test_every_model_is_listed_with_its_path(run_cli: Any, tmp_path: Path) -> None:
    done = run_cli("models", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    found = {entry["name"]: entry for entry in done.lines[0]["models"]}
    assert set(found) == set(group_options("model"))
    assert found["bert"]["path"] == "google-bert/bert-base-uncased"
    assert all(entry["path"] and entry["description"] for entry in found.values())


def test_words_find_models(run_cli: Any, tmp_path: Path) -> None:
    done = run_cli("models", "chinese macbert", cwd=tmp_path)
    assert done.out.splitlines()[0].startswith("chinese-macbert  hfl/chinese-macbert-base  ")
    assert run_cli("models", "klingon", cwd=tmp_path).code == 2
