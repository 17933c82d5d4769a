"""Every YAML that we ship composes, decodes and passes the checks."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_cli.cli.argv import split
from lora_cli.config.commands import COMMANDS, VARIANTS
from lora_cli.config.composed import Composed, recipe_text
from lora_cli.config.decode import decode
from lora_cli.config.groups import describe_option
from lora_cli.config.launch import run_command
from lora_cli.config.schema import package_folder, to_plain

CONFIGS = package_folder("configs")
OPTIONS = sorted(CONFIGS.rglob("*/*.yaml"))
PRIMARY = sorted(CONFIGS.glob("*.yaml"))
RECIPES = sorted(package_folder("recipes").rglob("*.yaml"))
ISSUE = {
    "model": "bert distilbert roberta deberta-v3 albert electra modernbert minilm "
    "multilingual-e5-small bert-base-chinese t5-small flan-t5-small flan-t5-base mt5-small "
    "bart-base mbart-50 marian-en-de marian-en-zh marian-zh-en pegasus-xsum",
    "task": "sst2 imdb ag_news cola emotion banking77 trec text_classification "
    "wmt14_en_de opus100_en_zh multi30k_en_de samsum dialogsum cnn_dailymail xsum lcsts e2e_nlg",
    "strategy": "lora full head top bitfit lora_then_full adapter prefix",
    "lora": "default all-linear rslora dora lora_fa pissa olora eva adalora vera",
    "optimizer": "adamw sgd adafactor lora_plus",
    "scheduler": "linear cosine constant polynomial",
    "trainer": "default short debug",
}


def compose(*arguments: str) -> Composed:
    seen: list[Composed] = []

    def job(composed: Composed) -> int:
        seen.append(composed)
        return 0

    line = split(arguments)
    assert line.command
    run_command(line.command, line.overrides, line.hydra_flags, recipe=line.recipe, job=job)
    (composed,) = seen
    return composed


def test_the_configs_that_were_promised_exist() -> None:
    for group, names in ISSUE.items():
        found = {path.stem for path in OPTIONS if path.parent.name == group}
        assert set(names.split()) <= found
    assert {path.stem for path in PRIMARY} == set(COMMANDS)
    assert RECIPES


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_option_composes(path: Path) -> None:
    group = path.parent.name
    chosen = {"model": "bert", "task": "sst2", group: path.stem}
    extra = ["task.data.path=x.csv"] if path.stem in VARIANTS["task"][1] else []
    composed = compose("train", *(f"{name}={option}" for name, option in chosen.items()), *extra)
    assert composed.choices[group] == path.stem
    assert decode(COMMANDS["train"], to_plain(composed.config)) == (composed.config, [])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_composes_and_says_what_it_is(path: Path, tmp_path: Path) -> None:
    composed = compose("train", str(path))
    assert path.read_text(encoding="utf-8").startswith("# ")
    written = tmp_path / "recipe.yaml"
    written.write_text(recipe_text(composed), encoding="utf-8")
    assert compose("train", str(written)).config == composed.config


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_options_hold_differences_only(path: Path) -> None:
    assert describe_option(path), "the first line is a comment that says what it is"
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert "'_target_'" not in str(content), "max_target_length is something else"


@pytest.mark.parametrize("command", ["eval", "predict", "merge", "export"])
def test_every_command_composes(command: str) -> None:
    composed = compose(command, "runs/x")
    assert composed.config.from_ == "runs/x"
    assert decode(COMMANDS[command], to_plain(composed.config)) == (composed.config, [])


def test_targets_compose() -> None:
    composed = compose("targets", "model=bert", "task=sst2", "lora=all-linear")
    assert decode(COMMANDS["targets"], to_plain(composed.config)) == (composed.config, [])
