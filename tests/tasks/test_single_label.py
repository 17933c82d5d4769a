"""The loss of one label a row, beside torch, whatever the input is."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from lora_cli.config.tasks import TextClassificationConfig
from lora_cli.data.types import Row
from lora_cli.tasks.single_label import SingleLabelTask

STATE = {"labels": ["a", "b", "c"], "columns": {"label": "y"}, "numbered": False}


class NumberReader:
    """Rows of numbers, which are the logits."""

    def encode(self, row: Row) -> dict[str, Any]:
        return {"id": row.id, "length": 1, "cut": 0, "supervised": 1, "x": row.values["x"]}

    def collate(self, features: Any) -> dict[str, Any]:
        return {"x": torch.tensor([row["x"] for row in features])}

    def inputs(self, batch: Any, model: Any) -> dict[str, torch.Tensor]:
        return {"x": batch["x"]}


def model(x: torch.Tensor) -> Any:
    return SimpleNamespace(logits=x)


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_torch(weights: list[float] | None, smoothing: float) -> None:
    state = STATE if weights is None else {**STATE, "weights": weights}
    task = SingleLabelTask(TextClassificationConfig(), state, NumberReader())
    rows = [
        Row(str(n), {"x": [float(n), 1.0, -0.5 * n], "y": "abc"[n % 3]}, "f", n) for n in range(5)
    ]
    batch = {**task.collate([task.encode(row) for row in rows]), "label_smoothing": smoothing}
    found = task.forward(model, batch)
    weight = None if weights is None else torch.tensor(weights)
    wanted = functional.cross_entropy(
        batch["x"], batch["labels"], weight, label_smoothing=smoothing, reduction="sum"
    )
    assert float(found.loss_sum) == pytest.approx(float(wanted))
    assert found.count == (5 if weight is None else float(weight[batch["labels"]].sum()))
    predictions = task.decode(found.outputs, batch)
    assert [row.label for row in predictions] == batch["x"].argmax(dim=1).tolist()
