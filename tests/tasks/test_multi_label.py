import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score
from transformers import AutoTokenizer

from lora_cli.config.tasks import DataConfig, MultiLabelClassificationConfig
from lora_cli.errors import UserError
from lora_cli.tasks.multi_label import MultiLabelClassification

FAMILY = MultiLabelClassification()
LABELS = ["anger", "joy", "love"]
STATE = {
    "labels": LABELS,
    "columns": {"text": "text", "text_pair": None, "label": "labels"},
    "numbered": False,
}


@pytest.fixture
def tokenizer(tiny_model_dir: Callable[..., Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir())


def write(folder: Path, *labels: Any, **settings: Any) -> MultiLabelClassificationConfig:
    """Write train and validation with the same rows."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"text": f"film {n}", "labels": x}) for n, x in enumerate(labels)]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines))
    data = DataConfig(path=str(folder), **settings.pop("data", {}))
    return MultiLabelClassificationConfig(data=data, **settings)


def test_labels_are_flags_in_order(tmp_path: Path, tokenizer: Any) -> None:
    config = write(tmp_path, ["joy", "anger"], [], "love, joy", ["joy"])
    splits = FAMILY.load(config, seed=0)
    task = FAMILY.build(config, splits.state, tokenizer)
    assert splits.state["labels"] == LABELS
    batch = task.collate([task.encode(row) for row in splits.rows["train"]])
    assert batch["labels"].tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 1], [0, 1, 0]]
    assert "train: 1 of 4 rows have no label" in splits.notes


def test_integers_are_named_in_order(tmp_path: Path, tokenizer: Any) -> None:
    config = write(tmp_path, [2, 0], [1], data={"label_names": ("anger", "joy", "love")})
    splits = FAMILY.load(config, seed=0)
    task = FAMILY.build(config, splits.state, tokenizer)
    rows = [task.encode(row)["labels"] for row in splits.rows["train"]]
    assert rows == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]


@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_the_loss_is_that_of_its_formula(tmp_path: Path, tokenizer: Any, weights: str) -> None:
    config = write(tmp_path, ["joy"], ["joy", "love"], ["anger"], [], class_weights=weights)
    splits = FAMILY.load(config, seed=0)
    task = FAMILY.build(config, splits.state, tokenizer)
    batch = task.collate([task.encode(row) for row in splits.rows["train"]])
    torch.manual_seed(0)
    logits = torch.randn(4, 3)
    output = task.forward(lambda **_: SimpleNamespace(logits=logits), batch)
    # anger 1 of 4 rows, joy 2 of 4, love 1 of 4: (N - n) / n.
    weight = torch.tensor([3.0, 1.0, 3.0] if weights == "balanced" else [1.0, 1.0, 1.0])
    y, p = batch["labels"], torch.sigmoid(logits)
    expected = -(weight * y * p.log() + (1 - y) * (1 - p).log()).sum()
    assert output.loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.count == 12


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_a_label_is_given_from_the_threshold_on(tokenizer: Any, threshold: float) -> None:
    task = FAMILY.build(MultiLabelClassificationConfig(threshold=threshold), STATE, tokenizer)
    torch.manual_seed(1)
    logits, labels = torch.randn(30, 3), (torch.rand(30, 3) < 0.4).float()
    batch = {"ids": [str(n) for n in range(30)], "labels": labels}
    predictions = task.decode({"logits": logits}, batch)
    expected = torch.sigmoid(logits.double()) >= threshold
    assert [p.labels for p in predictions] == [tuple(row) for row in expected.tolist()]
    score = f1_score(labels.numpy(), expected.numpy(), average="micro")
    assert task.metrics(predictions)["micro_f1"] == pytest.approx(score)
    assert task.report(predictions)["labels"] == LABELS


def test_a_line_of_predictions(tokenizer: Any) -> None:
    task = FAMILY.build(MultiLabelClassificationConfig(), STATE, tokenizer)
    outputs = {"logits": torch.tensor([[-50.0, 50.0, 50.0]])}
    (known,) = task.decode(outputs, {"ids": ["7"], "labels": torch.tensor([[1.0, 1.0, 0.0]])})
    assert task.to_json(known) == {
        "id": "7",
        "labels": ["joy", "love"],
        "probabilities": pytest.approx({"anger": 0.0, "joy": 1.0, "love": 1.0}),
        "reference": ["anger", "joy"],
    }
    (unknown,) = task.decode(outputs, {"ids": ["7"], "labels": None})
    assert "reference" not in task.to_json(unknown)
    assert set(task.metrics([unknown]).values()) == {0.0}


def test_a_label_that_train_lacks_is_refused_with_its_row(tmp_path: Path) -> None:
    config = write(tmp_path, ["joy"], ["love"])
    (tmp_path / "validation.jsonl").write_text('{"text": "x", "labels": ["joy", "awe"]}\n')
    with pytest.raises(UserError) as caught:
        FAMILY.load(config, seed=0)
    assert caught.value.problems[0].where == f'{tmp_path}/validation.jsonl row 1 ("awe")'


def test_the_model_has_an_output_for_each_label() -> None:
    options = FAMILY.model_options(STATE)
    assert options["problem_type"] == "multi_label_classification"
    assert options["id2label"] == {0: "anger", 1: "joy", 2: "love"}


def write_csv(path: Path, *rows: str, header: str = "text,toxic,insult,threat") -> Path:
    path.write_text("\n".join((header, *rows)) + "\n")
    return path


def columns_config(path: Path, **data: Any) -> MultiLabelClassificationConfig:
    return MultiLabelClassificationConfig(data=DataConfig(path=str(path), **data))


COLUMNS = ("toxic", "insult", "threat")


def test_columns_of_flags_are_labels(tmp_path: Path, tokenizer: Any) -> None:
    path = write_csv(tmp_path / "d.csv", "a,1,0,0", "b,0,0,0", "c,1,1,0", "d,1,1,1", "e,0,1,0")
    splits = FAMILY.load(columns_config(path, label_columns=COLUMNS), seed=0)
    assert splits.state["labels"] == list(COLUMNS)
    task = FAMILY.build(columns_config(path), splits.state, tokenizer)
    rows = [row for part in splits.rows.values() for row in part]
    flags = {row.values["text"]: task.encode(row)["labels"] for row in rows}
    assert flags == {
        "a": [1.0, 0.0, 0.0],
        "b": [0.0, 0.0, 0.0],
        "c": [1.0, 1.0, 0.0],
        "d": [1.0, 1.0, 1.0],
        "e": [0.0, 1.0, 0.0],
    }
    counts = [FAMILY.count_labels(rows, splits.state)[name] for name in COLUMNS]
    assert counts == [3, 3, 1]


@pytest.mark.parametrize("named", [(), ("threat", "toxic", "insult")])
def test_other_rows_have_the_same_columns(tmp_path: Path, named: tuple[str, ...]) -> None:
    path = write_csv(tmp_path / "d.csv", "a,1,0,0", "b,0,1,0", "c,1,1,1")
    state = FAMILY.load(columns_config(path, label_columns=COLUMNS), seed=0).state
    other = write_csv(tmp_path / "o.csv", "0,x,1", "1,y,0", header="insult,text,toxic")
    config = columns_config(other, label_columns=named or None)
    with pytest.raises(UserError) as caught:
        FAMILY.load_more(config, state, seed=0)
    assert caught.value.problems[0].id == "data.missing-column"
    write_csv(other, "0,x,1,true", "1,y,0,false", header="insult,text,toxic,threat")
    splits, bound = FAMILY.load_more(config, state, seed=0)
    assert list(FAMILY.count_labels(splits.rows["test"], bound).items()) == [
        ("toxic", 1),
        ("insult", 1),
        ("threat", 1),
    ]


def test_other_rows_may_list_what_columns_held(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "d.csv", "a,1,0,0", "b,0,1,0", "c,1,1,1")
    state = FAMILY.load(columns_config(path, label_columns=COLUMNS), seed=0).state
    other = write_csv(tmp_path / "o.csv", "x,insult", header="text,labels")
    splits, bound = FAMILY.load_more(columns_config(other), state, seed=0)
    assert FAMILY.count_labels(splits.rows["test"], bound)["insult"] == 1


def test_label_columns_are_those_of_the_adapter(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "d.csv", "a,1,0,0", "b,0,1,0", "c,1,1,1")
    state = FAMILY.load(columns_config(path, label_columns=COLUMNS), seed=0).state
    config = columns_config(path, label_columns=COLUMNS[:2])
    with pytest.raises(UserError) as caught:
        FAMILY.load_more(config, state, seed=0)
    assert [p.id for p in caught.value.problems] == ["data.other-labels"]


def test_labels_are_named_in_one_way(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "d.csv", "a,1,0,0")
    config = columns_config(path, label_columns=COLUMNS, label_column="labels")
    with pytest.raises(UserError) as caught:
        FAMILY.load(config, seed=0)
    assert [p.id for p in caught.value.problems] == ["data.labels-twice"]
