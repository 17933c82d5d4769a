import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_cli.commands.smoke_inputs import shrink_run


@pytest.fixture
def shrunk(compose_all: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[Any, list[str]]]:
    def make(*settings: str) -> tuple[Any, list[str]]:
        (composed,) = compose_all("train", *settings)
        folder = tmp_path / "small"
        folder.mkdir()
        return shrink_run(composed.config, folder)

    return make


def test_a_recipe_is_cut_down_and_nothing_else_changes(shrunk: Any, tmp_path: Path) -> None:
    kept = ("lora.r=16", "lora.layers=[11]", "optimizer.lr=0.5", "trainer.neftune_alpha=5")
    small, told = shrunk("model=bert", "task=sst2", *kept, "trainer.global_batch_size=6")
    assert (small.lora.r, small.lora.layers, small.optimizer.lr) == (16, (11,), 0.5)
    assert small.trainer.neftune_alpha == 5
    assert (small.trainer.max_steps, small.trainer.global_batch_size) == (4, 6)
    assert small.task.max_length == 64
    assert not small.smoke
    assert small.run.dir == str(tmp_path / "small" / "run")
    assert len(told) == 2
    config = json.loads((tmp_path / "small" / "model" / "config.json").read_bytes())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (12, 64)
    lines = (tmp_path / "small" / "data" / "train.jsonl").read_text().splitlines()
    assert len(lines) == 16
    assert set(json.loads(lines[0])) == {"sentence", "label"}


def test_less_than_the_usual_stays_less(shrunk: Any) -> None:
    less = ("trainer.max_steps=2", "trainer.global_batch_size=4", "trainer.micro_batch_size=2")
    small, _ = shrunk("model=bert", "task=sst2", *less, "task.data.max_train_rows=12")
    trainer = small.trainer
    assert (trainer.max_steps, trainer.global_batch_size, trainer.micro_batch_size) == (2, 4, 2)
    assert (small.task.data.max_train_rows, small.task.data.max_eval_rows) == (12, 8)


def test_there_is_room_for_the_largest_rank(shrunk: Any, tmp_path: Path) -> None:
    shrunk("model=bert-large", "task=sst2", "lora.r=8", "lora.rank_pattern={query: 200}")
    config = json.loads((tmp_path / "small" / "model" / "config.json").read_bytes())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (24, 256)


def test_a_hub_id_that_has_a_name_needs_no_architecture(shrunk: Any, tmp_path: Path) -> None:
    shrunk("model.path=FacebookAI/roberta-large", "task=sst2")
    config = json.loads((tmp_path / "small" / "model" / "config.json").read_bytes())
    assert (config["model_type"], config["num_hidden_layers"]) == ("roberta", 24)


def test_the_head_of_a_pretrained_model_is_there(shrunk: Any, tmp_path: Path) -> None:
    shrunk("model=bert", "task=wikitext")
    config = json.loads((tmp_path / "small" / "model" / "config.json").read_bytes())
    assert config["architectures"] == ["BertForMaskedLM"]
