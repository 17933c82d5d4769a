"""How far a coarser form of a model may be, shown on one whose noise is known."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.commands.merging import Probe
from lora_cli.commands.rounded import check_rounded
from lora_cli.errors import RunFailedError
from lora_cli.tasks.contract import StepOutput


class Task:
    metric = "accuracy"

    def forward(self, model: Any, batch: Any) -> StepOutput:
        return StepOutput(torch.zeros(()), 0, {"logits": model(batch["x"])})

    def decode(self, outputs: Any, batch: Any) -> list[bool]:
        return (outputs["logits"].argmax(-1) == batch["y"]).tolist()  # type: ignore[no-any-return]

    def metrics(self, predictions: Any) -> dict[str, float]:
        return {"accuracy": sum(predictions) / len(predictions)}


class Plain(nn.Module):
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.moved


@contextmanager
def noise(model: Any, generator: torch.Generator) -> Iterator[None]:
    model.moved = torch.tensor([0.01, -0.01])
    yield
    model.moved = 0.0


def probe() -> Probe:
    batch = {"x": torch.tensor([[1.0, 0.0], [0.02, 0.0]]), "y": torch.tensor([0, 0])}
    task: Any = Task()
    return Probe(task=task, batches=[batch], outputs=[{"logits": batch["x"]}], split="test", rows=2)


def test_what_noise_explains_passes_and_both_metrics_are_told() -> None:
    model = Plain()
    rounded = check_rounded(probe(), lambda x: x + torch.tensor([0.0, 0.03]), model, noise)
    assert rounded.bound == pytest.approx(4 * 0.01 + 1e-4)
    assert rounded.comparison.metrics == {
        "adapter": {"accuracy": 1.0},
        "exported": {"accuracy": 0.5},
    }
    assert rounded.text == (
        "2 rows: largest difference 3.00e-02, mean 1.50e-02, same decision in 50.00 %; "
        "accuracy 1.0000 before, 0.5000 after; rounding explains differences of 4.01e-02, and of "
        "2.01e-02 on average"
    )
    assert set(rounded.as_json()) == {
        *("rows", "max_abs_difference", "mean_abs_difference", "agreement"),
        *("bound", "mean_bound", "metrics"),
    }
    assert torch.equal(model(torch.zeros(1, 2)), torch.zeros(1, 2))


@pytest.mark.parametrize("off", [0.05, 0.025, float("nan"), float("inf")])
def test_more_than_noise_explains_is_refused(off: float) -> None:
    with pytest.raises(RunFailedError) as caught:
        check_rounded(probe(), lambda x: x + off, Plain(), noise)
    (problem,) = caught.value.problems
    assert problem.id == "export.differs"
    assert problem.allowed == "a difference of at most 0.04, and of 0.02 on average"


def test_outputs_that_are_no_numbers_pass_no_bound() -> None:
    given = probe()
    given.batches[0]["x"][0, 0] = torch.nan
    with pytest.raises(RunFailedError):
        check_rounded(given, lambda x: x, Plain(), noise)


def test_a_task_without_its_metric_is_told_without() -> None:
    given = probe()
    given.task.metric = "loss"
    assert "before" not in check_rounded(given, lambda x: x, Plain(), noise).text
