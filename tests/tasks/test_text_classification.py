import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss, matthews_corrcoef
from transformers import AutoTokenizer

from lora_cli.config.tasks import DataConfig, TextClassificationConfig
from lora_cli.data.types import Row
from lora_cli.errors import UserError
from lora_cli.tasks.single_label import LabelPrediction
from lora_cli.tasks.text_classification import TextClassification

FAMILY = TextClassification()
LABELS = ["bad", "fine", "good"]
STATE = {
    "labels": LABELS,
    "columns": {"text": "text", "text_pair": None, "label": "label"},
    "numbered": False,
}


@pytest.fixture
def tokenizer(tiny_model_dir: Callable[..., Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir())


def row(number: int, **values: Any) -> Row:
    return Row(str(number), values, "rows.jsonl", number)


def write(folder: Path, **splits: list[dict[str, Any]]) -> TextClassificationConfig:
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        text = "".join(json.dumps(line) + "\n" for line in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return TextClassificationConfig(data=DataConfig(path=str(folder)))


def lines(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"film {index}", "label": label} for index, label in enumerate(labels)]


def test_tokens_are_those_of_the_tokenizer(tokenizer: Any) -> None:
    task = FAMILY.build(TextClassificationConfig(max_length=6), STATE, tokenizer)
    short = task.encode(row(1, text="a good film", label="good"))
    assert short["inputs"]["input_ids"] == tokenizer("a good film")["input_ids"]
    assert (short["label"], short["cut"], short["length"]) == (2, 0, 5)
    cut = task.encode(row(2, text="a good film and a bad film", label="bad"))
    assert tokenizer.decode(cut["inputs"]["input_ids"]) == "[CLS] a good film and [SEP]"
    assert (cut["label"], cut["cut"], cut["length"]) == (0, 3, 6)


def test_pairs_have_two_segments(tokenizer: Any) -> None:
    state = {**STATE, "columns": {"text": "a", "text_pair": "b", "label": None}}
    task = FAMILY.build(TextClassificationConfig(), state, tokenizer)
    features = task.encode(row(1, a="a good film", b="the story", label="not read"))
    assert features["inputs"]["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert features["label"] is None


def test_batches_are_padded_and_masked(tokenizer: Any) -> None:
    task = FAMILY.build(TextClassificationConfig(), STATE, tokenizer)
    batch = task.collate(
        [
            task.encode(row(1, text="a good film", label="good")),
            task.encode(row(2, text="bad", label="bad")),
        ]
    )
    assert batch["ids"] == ["1", "2"]
    assert batch["inputs"]["input_ids"].shape == (2, 5)
    assert batch["inputs"]["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [2, 0]


def test_loss_predictions_and_metrics_are_those_of_scikit_learn(tokenizer: Any) -> None:
    task = FAMILY.build(TextClassificationConfig(), STATE, tokenizer)
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 3), torch.randint(0, 3, (40,))
    batch = {"ids": [str(i) for i in range(40)], "inputs": {}, "labels": labels}
    output = task.forward(lambda: SimpleNamespace(logits=logits), batch)
    predictions = task.decode(output.outputs, batch)
    probabilities = [prediction.probabilities for prediction in predictions]
    predicted = [prediction.label for prediction in predictions]
    assert output.count == 40
    assert float(output.loss_sum) / 40 == pytest.approx(
        log_loss(labels, probabilities, labels=[0, 1, 2]), rel=1e-5
    )
    assert all(math.isclose(sum(p), 1.0, abs_tol=1e-6) for p in probabilities)
    assert task.metrics(predictions) == pytest.approx(
        {
            "accuracy": accuracy_score(labels, predicted),
            "macro_f1": f1_score(labels, predicted, average="macro"),
            "matthews_correlation": matthews_corrcoef(labels, predicted),
        }
    )
    report = task.report(predictions)
    assert report["labels"] == LABELS
    assert sum(sum(counts) for counts in report["confusion"]) == 40


def test_a_line_of_predictions(tokenizer: Any) -> None:
    task = FAMILY.build(TextClassificationConfig(), STATE, tokenizer)
    line = task.to_json(LabelPrediction("7", 2, (0.1, 0.2, 0.7), 0))
    assert line == {
        "id": "7",
        "label": "good",
        "probabilities": {"bad": 0.1, "fine": 0.2, "good": 0.7},
        "reference": "bad",
    }
    assert "reference" not in task.to_json(LabelPrediction("7", 2, (0.1, 0.2, 0.7), None))


def test_label_order_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    first = write(tmp_path / "a", train=lines("b", "a", "c"), validation=lines("a"))
    second = write(tmp_path / "b", train=lines("c", "b", "a"), validation=lines("a"))
    assert FAMILY.load(first, seed=0).state["labels"] == ["a", "b", "c"]
    assert FAMILY.load(second, seed=0).state["labels"] == ["a", "b", "c"]


def test_integer_labels_are_named_in_order(tmp_path: Path, tokenizer: Any) -> None:
    config = write(tmp_path / "d", train=lines(1, 0, 1), validation=lines(0))
    named = TextClassificationConfig(
        data=DataConfig(path=config.data.path, label_names=("no", "yes"))
    )
    splits = FAMILY.load(named, seed=0)
    task = FAMILY.build(named, splits.state, tokenizer)
    assert splits.state["labels"] == ["no", "yes"]
    assert [task.encode(row)["label"] for row in splits.rows["train"]] == [1, 0, 1]


def test_ten_integer_labels_sort_as_numbers(tmp_path: Path) -> None:
    config = write(tmp_path / "d", train=lines(*range(12)), validation=lines(10))
    assert FAMILY.load(config, seed=0).state["labels"] == [str(index) for index in range(12)]


def test_every_fault_of_the_data_is_reported_at_once(tmp_path: Path) -> None:
    config = write(
        tmp_path / "d",
        train=[*lines("a", "b"), {"text": None, "label": "a"}],
        validation=[{"text": "x", "label": None}],
    )
    with pytest.raises(UserError) as caught:
        FAMILY.load(config, seed=0)
    assert [problem.where for problem in caught.value.problems] == [
        f"{tmp_path}/d/train.jsonl row 3 (null)",
        f"{tmp_path}/d/validation.jsonl row 1 (null)",
    ]


def test_a_label_that_train_lacks_is_refused(tmp_path: Path) -> None:
    config = write(tmp_path / "d", train=lines("a", "b"), validation=lines("a", "z"))
    with pytest.raises(UserError, match="z") as caught:
        FAMILY.load(config, seed=0)
    assert caught.value.problems[0].allowed == "a, b"


def test_new_rows_are_read_with_the_labels_of_the_adapter(tmp_path: Path) -> None:
    state = {**STATE, "columns": {"text": "gone", "text_pair": None, "label": "gone"}}
    config = write(tmp_path / "d", test=lines("good", "bad"))
    splits, bound = FAMILY.load_more(config, state, seed=0)
    assert bound["labels"] == LABELS
    assert bound["columns"] == STATE["columns"]
    assert len(splits.rows["test"]) == 2
    bad = write(tmp_path / "e", test=lines("good", "superb"))
    with pytest.raises(UserError, match="superb"):
        FAMILY.load_more(bad, state, seed=0)


def test_a_single_file_of_new_rows_is_the_test_split(tmp_path: Path) -> None:
    write(tmp_path / "d", new=lines("good", "bad", "fine"))
    data = DataConfig(path=str(tmp_path / "d" / "new.jsonl"), max_train_rows=1, max_eval_rows=2)
    splits, _ = FAMILY.load_more(TextClassificationConfig(data=data), STATE, seed=0)
    assert {name: len(rows) for name, rows in splits.rows.items()} == {"test": 2}


def test_rows_to_predict_need_no_label_and_may_call_the_text_otherwise() -> None:
    bound = FAMILY.bind_columns(["sentence", "label"], STATE, where="new.jsonl")
    assert bound["columns"] == {"text": "sentence", "text_pair": None, "label": None}
    with pytest.raises(UserError) as caught:
        FAMILY.bind_columns(["x", "y"], STATE, where="new.jsonl")
    assert caught.value.problems[0].allowed == "x, y"
    with pytest.raises(UserError, match="`text` must hold a text"):
        FAMILY.check_row(row(3, text=" "), STATE)


def test_model_options_name_the_labels() -> None:
    options = FAMILY.model_options(STATE)
    assert options["id2label"] == {0: "bad", 1: "fine", 2: "good"}
    assert options["label2id"] == {"bad": 0, "fine": 1, "good": 2}
    assert options["num_labels"] == 3


@pytest.mark.parametrize("smoothing", [0.1, 0.9])
def test_label_smoothing_equals_torch_and_its_formula(tokenizer: Any, smoothing: float) -> None:
    task = FAMILY.build(TextClassificationConfig(), STATE, tokenizer)
    rows = [row(number, text="a film", label=label) for number, label in enumerate(LABELS)]
    batch = task.collate([task.encode(item) for item in rows])
    torch.manual_seed(0)
    logits = torch.randn(3, 3)
    plain = task.forward(lambda **_: SimpleNamespace(logits=logits), batch)
    batch["label_smoothing"] = smoothing
    smooth = task.forward(lambda **_: SimpleNamespace(logits=logits), batch)
    mean = torch.nn.functional.cross_entropy(
        logits, torch.tensor([0, 1, 2]), label_smoothing=smoothing
    )
    assert smooth.loss_sum.item() == pytest.approx(3 * mean.item(), rel=1e-5)
    spread = -logits.log_softmax(dim=1).mean(dim=1).sum()
    expected = (1 - smoothing) * plain.loss_sum + smoothing * spread
    assert smooth.loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert smooth.count == plain.count == 3


def test_balanced_weights_equal_those_of_scikit_learn_and_torch(
    tmp_path: Path, tokenizer: Any
) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    rows = lines("good", "good", "good", "bad", "fine", "fine")
    config = write(tmp_path / "d", train=rows, validation=rows)
    config = replace(config, class_weights="balanced")
    splits = FAMILY.load(config, seed=0)
    labels = [item["label"] for item in rows]
    weights = compute_class_weight("balanced", classes=np.array(LABELS), y=labels)
    assert splits.state["weights"] == pytest.approx(weights.tolist())
    task = FAMILY.build(config, splits.state, tokenizer)
    batch = task.collate([task.encode(item) for item in splits.rows["train"]])
    torch.manual_seed(0)
    logits = torch.randn(6, 3)
    output = task.forward(lambda **_: SimpleNamespace(logits=logits), batch)
    mean = torch.nn.functional.cross_entropy(
        logits, batch["labels"], torch.tensor(weights, dtype=torch.float32)
    )
    assert output.loss_sum.item() / output.count == pytest.approx(mean.item(), rel=1e-5)


def test_weights_are_of_the_rows_that_are_trained_on(tmp_path: Path) -> None:
    rows = lines(*["good"] * 30, *["bad"] * 10)
    config = write(tmp_path / "d", train=rows, validation=rows)
    data = replace(config.data, max_train_rows=12)
    splits = FAMILY.load(replace(config, data=data, class_weights="balanced"), seed=0)
    bad = sum(item.values["label"] == "bad" for item in splits.rows["train"])
    assert splits.state["weights"] == pytest.approx([6 / bad, 6 / (12 - bad)])
