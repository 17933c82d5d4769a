from pathlib import Path
from typing import Any

from lora_cli.config.origins import located
from lora_cli.errors import Problem


def problem(key: str | None, where: str | None = None) -> Problem:
    return Problem(id="x.y", message="No.", key=key, where=where)


def test_an_entry_of_a_mapping_is_where_the_mapping_is() -> None:
    origins = {"lora.rank_pattern": "r.yaml:3", "lora.r": "r.yaml:2"}
    assert located(problem("lora.rank_pattern.a.b"), origins).where == "r.yaml:3"
    assert located(problem("lora.r"), origins).where == "r.yaml:2"
    assert located(problem("lora.alpha"), origins).where is None
    assert located(problem("lora.r", "here"), origins).where == "here"
    assert located(problem(None), origins).where is None


def test_the_command_line_takes_the_place_of_the_recipe(compose_all: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("defaults: [model: bert, task: sst2]\nlora:\n  rank_pattern:\n    query: 4\n")
    (alone,) = compose_all("train", str(path))
    assert alone.origins["lora.rank_pattern"] == f"{path}:3"
    assert "lora.rank_pattern.query" not in alone.origins
    (both,) = compose_all("train", str(path), "lora.rank_pattern={key: 2}")
    assert both.origins["lora.rank_pattern"] == "command line, lora.rank_pattern={key: 2}"
