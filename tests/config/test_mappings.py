"""Settings that map names to values are one setting each, from any place to any place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_cli.config.composed import Composed
from lora_cli.errors import Problem

Compose = Callable[..., list[Composed]]
Problems = Callable[..., list[Problem]]

NAMED = ("train", "model=bert", "task=sst2")

PATTERNS = """
defaults: [model: bert, task: sst2]
lora:
  r: 3
  rank_pattern:
    query: 4
    "*.layer.[!0].*": ${lora.r}
    0: 2
"""


def test_a_mapping_in_a_recipe(compose_all: Compose, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(PATTERNS)
    (found,) = compose_all("train", str(path))
    assert found.config.lora.rank_pattern == {"query": 4, "*.layer.[!0].*": 3, "0": 2}
    assert found.plain["lora"]["rank_pattern"] == found.config.lora.rank_pattern
    assert found.user["lora"]["rank_pattern"] == found.config.lora.rank_pattern


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("{key: 1}", {"key": 1}), ('{"*.[1].*":1}', {"*.[1].*": 1}), ("{}", {})],
)
def test_the_mapping_of_the_command_line_is_the_whole_mapping(
    compose_all: Compose, tmp_path: Path, capsys: Any, typed: str, expected: dict[str, int]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(PATTERNS)
    line = ("train", str(path), f"lora.rank_pattern={typed}")
    (found,) = compose_all(*line)
    assert found.config.lora.rank_pattern == expected
    assert found.user["lora"]["rank_pattern"] == expected
    (job,) = compose_all(*line, "-m")
    assert job.config.lora.rank_pattern == expected
    assert compose_all(*line, "--cfg", "job", "-p", "lora.rank_pattern") == []
    assert "query" not in capsys.readouterr().out


def test_a_sweep_over_mappings(compose_all: Compose, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(PATTERNS)
    jobs = compose_all("train", str(path), "-m", "lora.rank_pattern={a: 1},{'b.*': 2},{}")
    assert [job.config.lora.rank_pattern for job in jobs] == [{"a": 1}, {"b.*": 2}, {}]


def test_the_mapping_of_a_recipe_takes_the_place_of_an_options(
    compose_all: Compose, tmp_path: Path
) -> None:
    (tmp_path / "mine" / "lora").mkdir(parents=True)
    (tmp_path / "mine" / "lora" / "own.yaml").write_text("rank_pattern: {value: 9}\n")
    path = tmp_path / "r.yaml"
    for body, expected in (("{query: 4}", {"query": 4}), ("{}", {})):
        path.write_text(f"defaults: [model: bert, task: sst2]\nlora:\n  rank_pattern: {body}\n")
        line = ("train", str(path), "--config-dir", "mine", "lora=own")
        (found,) = compose_all(*line)
        assert found.config.lora.rank_pattern == expected
    path.write_text("defaults: [model: bert, task: sst2]\n")
    (found,) = compose_all("train", str(path), "--config-dir", "mine", "lora=own")
    assert found.config.lora.rank_pattern == {"value": 9}


def test_bad_entries_of_mappings(problems_of: Problems, tmp_path: Path) -> None:
    line = (*NAMED, "lora.rank_pattern={query: 0, key: 2}")
    (problem,) = problems_of(*line)
    assert problem.key == "lora.rank_pattern.query"
    assert problem.where == "command line, lora.rank_pattern={query: 0, key: 2}"
    (single,) = problems_of(*NAMED, "lora.rank_pattern.query=4")
    assert single.fix == "'lora.rank_pattern={query: 4}'"
    (twice,) = problems_of(*NAMED, "lora.rank_pattern={a: 1, 'a': 2}")
    assert (twice.id, twice.key) == ("config.repeated", "lora.rank_pattern")
    (grammar,) = problems_of(*NAMED, "lora.rank_pattern={'[!a]': 1}")
    assert "a recipe takes any name" in str(grammar.fix)
    (null,) = problems_of(*NAMED, "lora.rank_pattern=null")
    assert null.fix == "the default is lora.rank_pattern={}"
