import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_cli.commands.smoke_inputs import shrink_run
from lora_cli.errors import UserError


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


def test_long_rows_are_fewer(shrunk: Any, tmp_path: Path) -> None:
    lines = (json.dumps({"text": f"word {n} " * 1500}) + "\n" for n in range(40))
    (tmp_path / "train.jsonl").write_text("".join(lines))
    data = f"task.data.path={tmp_path}/train.jsonl"
    small, told = shrunk("model=bert", "task=masked_language_modeling", data)
    assert (small.task.data.max_train_rows, small.task.data.max_eval_rows) == (2, 1)
    assert (small.trainer.global_batch_size, small.trainer.eval_batch_size) == (1, 1)
    assert "data: rows are long, so 2 of them are trained on" in told


def ranked_rows(users: int, *, each: int) -> list[dict[str, Any]]:
    return [
        {"user": user, "history": "h", "candidate": f"c {n}", "label": int(n in (0, each - 1))}
        for user in range(users)
        for n in range(each)
    ]


def test_users_with_many_rows_stay_whole(shrunk: Any, tmp_path: Path) -> None:
    for split, rows in (
        ("train", ranked_rows(3, each=4)),
        ("validation", ranked_rows(3, each=12)),
        ("test", ranked_rows(3, each=15)),
    ):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small, _ = shrunk("model=bert", "task=ranking", f"task.data.path={tmp_path}")
    assert small.task.data.max_eval_rows == 15


def test_an_own_limit_below_the_rows_of_a_user_is_refused(shrunk: Any, tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ranked_rows(8, each=12))
    (tmp_path / "train.jsonl").write_text(lines)
    data = f"task.data.path={tmp_path}/train.jsonl"
    with pytest.raises(UserError, match="has 12 at least, but is 5"):
        shrunk("model=bert", "task=ranking", data, "task.data.max_eval_rows=5")
