from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.tasks.contract import StepOutput
from lora_cli.training.evaluation import evaluate_rows, evaluating


class Echo:
    """A task whose prediction is the row itself, and whose loss is its length."""

    def collate(self, features: Any) -> dict[str, Any]:
        return {
            "ids": [row["id"] for row in features],
            "x": torch.tensor([float(row["length"]) for row in features]),
        }

    def forward(self, model: Any, batch: Any) -> StepOutput:
        x = model(batch["x"])
        return StepOutput(x.sum(), len(x), {"x": x})

    def decode(self, outputs: Any, batch: Any) -> list[Any]:
        return list(zip(batch["ids"], outputs["x"].tolist(), strict=True))

    def metrics(self, predictions: Any) -> dict[str, float]:
        return {"rows": float(len(predictions))}


@pytest.mark.parametrize("rows", range(1, 18))
@pytest.mark.parametrize("batch", range(1, 6))
def test_every_row_is_seen_once_in_its_place(rows: int, batch: int) -> None:
    features = [{"id": str(index), "length": (index * 7) % 5} for index in range(rows)]
    done: list[int] = []
    task: Any = Echo()
    evaluation = evaluate_rows(
        task,
        nn.Identity(),
        features,
        batch_size=batch,
        device=torch.device("cpu"),
        on_rows=done.append,
    )
    assert list(evaluation.predictions) == [(row["id"], row["length"]) for row in features]
    assert evaluation.loss == pytest.approx(sum(row["length"] for row in features) / rows)
    assert evaluation.metrics(task) == {"rows": rows, "loss": evaluation.loss}
    assert done[-1] == rows


def test_modes_are_given_back_module_by_module() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
    model.train()
    model[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False, False]


def test_modes_are_given_back_after_an_error() -> None:
    model = nn.Dropout()
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert model.training


def test_what_is_no_module_is_called_as_it_is() -> None:
    task: Any = Echo()
    evaluation = evaluate_rows(
        task,
        lambda x: x * 2,
        [{"id": "a", "length": 3}],
        batch_size=1,
        device=torch.device("cpu"),
    )
    assert evaluation.predictions == (("a", 6.0),)
