import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lora_cli.config.tasks import DataConfig, TextRegressionConfig
from lora_cli.errors import UserError
from lora_cli.tasks.text_regression import TextRegression

FAMILY = TextRegression()
COLUMNS = {"text": "text", "text_pair": None, "label": "score"}
STATE = {"columns": COLUMNS, "low": 1.0, "high": 5.0, "mean": 3.25}


@pytest.fixture
def tokenizer(tiny_model_dir: Callable[..., Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir())


def write(folder: Path, *numbers: Any) -> TextRegressionConfig:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"text": f"film {n}", "score": x}) for n, x in enumerate(numbers)]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines))
    return TextRegressionConfig(data=DataConfig(path=str(folder)))


def test_numbers_may_be_texts_as_in_csv(tmp_path: Path, tokenizer: Any) -> None:
    config = write(tmp_path, 1, "2.5", -3.0)
    splits = FAMILY.load(config, seed=0)
    task = FAMILY.build(config, splits.state, tokenizer)
    batch = task.collate([task.encode(row) for row in splits.rows["train"]])
    assert batch["numbers"].tolist() == [1.0, 2.5, -3.0]
    assert "3 train, 3 validation rows, numbers from -3 to 2.5, mean 0.1667" in splits.notes[-1]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "null"),
        ("high", '"high"'),
        (" ", "empty"),
        (True, "true or false"),
        ([1.0], "a list"),
        ("nan", '"nan"'),
        ("inf", '"inf"'),
        (10**400, "too large a number"),
    ],
)
def test_what_is_no_number_is_refused_with_its_row(tmp_path: Path, value: Any, said: str) -> None:
    with pytest.raises(UserError, match="finite number") as caught:
        FAMILY.load(write(tmp_path, 1, 2, value), seed=0)
    assert f"train.jsonl row 3 ({said})" in (caught.value.problems[0].where or "")


def test_true_numbers_are_written_as_they_were(tmp_path: Path, tokenizer: Any) -> None:
    # Neither is a number of 32 bits, and the last two would be one there.
    numbers = [3.3, 1_700_000_001.0, 1_700_000_002.0]
    config = write(tmp_path, *numbers)
    splits = FAMILY.load(config, seed=0)
    task = FAMILY.build(config, splits.state, tokenizer)
    batch = task.collate([task.encode(row) for row in splits.rows["train"]])
    predictions = task.decode({"logits": torch.zeros(3, 1)}, batch)
    assert [task.to_json(one)["reference"] for one in predictions] == numbers


def test_equal_numbers_teach_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two different numbers, but has only 2"):
        FAMILY.load(write(tmp_path, 2, 2.0, "2"), seed=0)


def test_the_loss_is_the_squared_difference(tokenizer: Any) -> None:
    task = FAMILY.build(TextRegressionConfig(), STATE, tokenizer)
    batch: dict[str, Any] = {"ids": ["1", "2"], "inputs": {}, "references": [1.0, 4.0]}
    batch["numbers"] = torch.tensor(batch["references"])
    model = lambda: SimpleNamespace(logits=torch.tensor([[3.0], [3.5]]))  # noqa: E731
    output = task.forward(model, batch)
    assert (output.loss_sum.item(), output.count) == (4.25, 2)
    predictions = task.decode(output.outputs, batch)
    assert task.metrics(predictions)["mse"] == pytest.approx(4.25 / 2)
    assert task.to_json(predictions[0]) == {"id": "1", "value": 3.0, "reference": 1.0}
    batch |= {"numbers": None, "references": [None, None]}
    assert task.forward(model, batch).count == 0
    (first, _) = task.decode(output.outputs, batch)
    assert task.to_json(first) == {"id": "1", "value": 3.0}
    assert task.report(predictions) == {}


def test_a_smaller_error_is_better() -> None:
    for metric, greater in (("pearson", True), ("spearman", True), ("mse", False)):
        task = FAMILY.build(TextRegressionConfig(metric=metric), STATE, None)  # type: ignore[arg-type]
        assert task.greater_is_better is greater


def test_a_new_head_begins_at_the_mean(tiny_model_dir: Callable[..., Path]) -> None:
    options = FAMILY.model_options(STATE)
    bert = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir(), **options)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(vocab_size=50, num_hidden_layers=1, **sizes, **options)
    roberta = RobertaForSequenceClassification(config)
    for model, last in ((bert, bert.classifier), (roberta, roberta.classifier.out_proj)):
        before = last.weight.clone()
        FAMILY.start_head(model, STATE)
        assert last.bias.tolist() == [3.25]
        assert torch.equal(last.weight, before)
    assert roberta.classifier.dense.bias.abs().max() < 1
