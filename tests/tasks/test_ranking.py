import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from transformers import AutoTokenizer

from lora_cli.config.tasks import DataConfig, RankingConfig
from lora_cli.data.types import Row
from lora_cli.errors import UserError
from lora_cli.tasks.ranking import Ranking, RankPrediction

FAMILY = Ranking()
COLUMNS = {"history": "h", "candidate": "c", "label": "y", "user": "u", "time": None}
STATE = {"columns": COLUMNS, "clicked": 0.5}


@pytest.fixture
def tokenizer(tiny_model_dir: Callable[..., Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir())


def build(tokenizer: Any, *, state: Any = STATE, **settings: Any) -> Any:
    return FAMILY.build(RankingConfig(**settings), state, tokenizer)


def row(number: int = 1, **values: Any) -> Row:
    base = {"u": 7, "h": ["one film", "two film"], "c": "a good story", "y": 1}
    return Row(str(number), {**base, **values}, "rows.jsonl", number)


def write(folder: Path, config: Any = None, **splits: list[dict[str, Any]]) -> RankingConfig:
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        text = "".join(json.dumps(line) + "\n" for line in rows)
        (folder / f"{name}.jsonl").write_text(text)
    settings = dict(config or {})
    data = DataConfig(path=str(folder), **settings.pop("data", {}))
    return RankingConfig(data=data, **settings)


def lines(user: str, *clicks: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"user": user, "history": "a", "candidate": f"b {user} {n}", "label": y, "time": start + n}
        for n, y in enumerate(clicks)
    ]


def test_a_candidate_is_read_after_the_history_whose_oldest_part_is_cut(tokenizer: Any) -> None:
    features = build(tokenizer).encode(row())
    (inputs,) = features["inputs"]
    assert tokenizer.decode(inputs["input_ids"]).startswith("[CLS] one film ; two film [SEP] a")
    assert (features["user"], features["labels"], features["supervised"]) == ("7", [1], 1)
    assert json.loads(json.dumps(features)) == features
    features = build(tokenizer, max_length=8).encode(row())
    (inputs,) = features["inputs"]
    assert tokenizer.decode(inputs["input_ids"]) == "[CLS] two film [SEP] a good story [SEP]"
    assert (features["cut"], features["length"]) == (3, 8)
    # The tokenizer of others still cuts the end.
    assert tokenizer.truncation_side == "right"
    with pytest.raises(UserError, match="needs 6 tokens") as caught:
        build(tokenizer, max_length=5).encode(row())
    assert caught.value.problems[0].where == "rows.jsonl row 1"


def test_a_history_may_be_empty(tokenizer: Any) -> None:
    for history in ("", []):
        assert FAMILY.check_rows([row(h=history)], COLUMNS) == []
        (inputs,) = build(tokenizer).encode(row(h=history))["inputs"]
        assert tokenizer.decode(inputs["input_ids"]) == "[CLS] [SEP] a good story [SEP]"


ROWS = [
    row(1, c=["a film", "bad"], y=[0, 1]),
    row(2, c="good", y=0),
    row(3, c=["x", "the story", "fine"], y=[1, 0, 1], u=8),
]


def test_rows_with_and_without_lists_share_a_batch(tokenizer: Any) -> None:
    task = build(tokenizer, k=2)
    batch = task.collate([task.encode(one) for one in ROWS])
    assert batch["inputs"]["input_ids"].shape[0] == 6
    assert batch["labels"].tolist() == [0, 1, 0, 1, 0, 1]
    logits = torch.tensor([[0.5], [-1.0], [-2.0], [0.1], [0.2], [-3.0]], requires_grad=True)
    output = task.forward(lambda **_: SimpleNamespace(logits=logits), batch)
    chances = logits.detach().sigmoid().squeeze(1).tolist()
    assert output.count == 6
    assert float(output.loss_sum.detach()) / 6 == pytest.approx(
        log_loss([0, 1, 0, 1, 0, 1], chances), rel=1e-5
    )
    output.loss_sum.backward()
    assert bool((torch.as_tensor(logits.grad) != 0).all())
    assert output.outputs["logits"].shape == (3, 3)
    predictions = task.decode(output.outputs, batch)
    assert [p.scores for p in predictions] == [
        pytest.approx(chances[:2]),
        pytest.approx(chances[2:3]),
        pytest.approx(chances[3:]),
    ]
    # The first two rows are of one user, and are ranked together.
    found = task.metrics(predictions)
    aucs = [roc_auc_score([0, 1, 0], chances[:3]), roc_auc_score([1, 0, 1], chances[3:])]
    assert found["auc"] == pytest.approx(np.mean(aucs))
    assert found["auc_all"] == pytest.approx(roc_auc_score([0, 1, 0, 1, 0, 1], chances))


def test_rows_without_labels_have_no_loss(tokenizer: Any) -> None:
    state = FAMILY.bind_columns(["h", "c"], STATE, where="new")
    task = build(tokenizer, state=state)
    batch = task.collate([task.encode(row(y="unread"))])
    output = task.forward(lambda **_: SimpleNamespace(logits=torch.zeros(1, 1)), batch)
    assert (output.count, batch["labels"]) == (0, None)
    (prediction,) = task.decode(output.outputs, batch)
    assert task.to_json(prediction) == {"id": "1", "candidate": "a good story", "score": 0.5}


def test_a_list_is_written_best_first(tokenizer: Any) -> None:
    prediction = RankPrediction("1", "u", ("a", "b", "c"), (0.1, 0.9, 0.1), (0, 1, 0), True)
    assert build(tokenizer).to_json(prediction) == {
        "id": "1",
        "user": "u",
        "ranking": [
            {"rank": 1, "candidate": "b", "score": 0.9, "reference": 1},
            {"rank": 2, "candidate": "a", "score": 0.1, "reference": 0},
            {"rank": 3, "candidate": "c", "score": 0.1, "reference": 0},
        ],
    }


def test_whole_users_validate_who_clicked_something(tmp_path: Path) -> None:
    users = [line for n in range(9) for line in lines(f"u{n}", 0, 1, 0)]
    config = write(tmp_path / "d", train=[*users, *lines("none", 0, 0, 0)])
    splits = FAMILY.load(config, seed=1)
    names = {split: {r.values["user"] for r in rows} for split, rows in splits.rows.items()}
    assert len(names["validation"]) == 1
    assert not names["train"] & names["validation"]
    assert "none" in names["train"]
    assert any("whole users" in note for note in splits.notes)
    assert FAMILY.count_labels(splits.rows["train"], splits.state) == {
        "clicked": 8,
        "not clicked": 19,
    }


def test_the_latest_rows_validate_by_time(tmp_path: Path) -> None:
    users = [line for n in range(9) for line in lines(f"u{n}", 0, 1, 0, 1, start=5 - n)]
    config = write(
        tmp_path / "d",
        {"data": {"time_column": "time", "validation_split": 0.25}},
        train=users,
    )
    splits = FAMILY.load(config, seed=1)
    assert [row.values["candidate"][-1] for row in splits.rows["validation"]] == ["3"] * 9


def test_users_without_clicks_cannot_be_evaluated(tmp_path: Path) -> None:
    train = [*lines("a", 0, 1), *lines("c", 0, 0)]
    validation = [*lines("a", 1, 0), *lines("b", 0, 0)]
    config = write(tmp_path / "d", train=train, validation=validation)
    with pytest.raises(UserError) as caught:
        FAMILY.load(config, seed=0)
    (problem,) = caught.value.problems
    assert problem.id == "data.no-clicks"
    assert problem.where == f"{tmp_path}/d/validation.jsonl row 3 (the user's first row)"
    skipping = RankingConfig(data=config.data, users_without_clicks="skip")
    splits = FAMILY.load(skipping, seed=0)
    with pytest.raises(UserError, match="1 user has none"):
        FAMILY.load_more(config, splits.state, seed=0)
    again, _ = FAMILY.load_more(skipping, splits.state, seed=0)
    assert len(again.rows["validation"]) == 4


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"label": 2}, ["data.bad-click"]),
        ({"user": None}, ["data.bad-user"]),
        ({"history": None, "candidate": ""}, ["data.bad-passage", "data.bad-candidate"]),
        ({"candidate": ["a", "b"], "label": [1]}, ["data.bad-click-count"]),
    ],
)
def test_faults_are_told_by_place(tmp_path: Path, change: dict[str, Any], found: list[str]) -> None:
    rows = lines("a", 0, 1)
    rows[1] |= change
    config = write(tmp_path / "d", train=rows, validation=lines("a", 0, 1))
    with pytest.raises(UserError) as caught:
        FAMILY.load(config, seed=0)
    assert [p.id for p in caught.value.problems] == found
    row = f"{tmp_path}/d/train.jsonl row 2 ("
    assert all((p.where or "").startswith(row) for p in caught.value.problems)


def test_train_must_have_both_kinds(tmp_path: Path) -> None:
    config = write(tmp_path / "d", train=lines("a", 1, 1), validation=lines("a", 1, 1))
    with pytest.raises(UserError, match="only label 1"):
        FAMILY.load(config, seed=0)


def test_the_model_has_one_output() -> None:
    assert FAMILY.model_options(STATE)["num_labels"] == 1
    assert FAMILY.describe(STATE) == "50.0 % clicked"
