"""The comparison after merging: what it measures and where it draws the line."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_cli.commands.merging import TOLERANCE, Probe, check_same
from lora_cli.errors import RunFailedError
from lora_cli.tasks.contract import StepOutput


class PlainTask:
    def forward(self, model: Any, batch: Any) -> StepOutput:
        return StepOutput(torch.zeros(()), 0, {"logits": model(batch["x"])})

    metric = "first"

    def decode(self, outputs: Any, batch: Any) -> list[float]:
        return [float(row[0]) for row in outputs["logits"]]

    def metrics(self, predictions: list[float]) -> dict[str, float]:
        return {"first": sum(predictions) / len(predictions), "none": float("nan")}


def probe_of(*batches: list[list[float]]) -> Any:
    tensors = [torch.tensor(batch) for batch in batches]
    task: Any = PlainTask()
    outputs = [{"logits": tensor} for tensor in tensors]
    rows = sum(len(batch) for batch in batches)
    inputs: Any = [{"x": tensor} for tensor in tensors]
    return Probe(task=task, batches=inputs, outputs=outputs, split="validation", rows=rows)


def test_difference_and_agreement_are_counted_over_all_batches() -> None:
    probe = probe_of([[0.0, 1.0], [2.0, 0.0]], [[0.0, 3.0]])
    found = check_same(probe, lambda x: x + 5e-5, torch.float32, what="merged")
    assert found.rows == 3
    assert found.max_abs_difference == pytest.approx(5e-5, rel=0.02)
    assert found.mean_abs_difference == pytest.approx(5e-5, rel=0.02)
    assert found.agreement == 1.0
    assert "3 rows: largest difference 5.0" in found.text
    assert found.text.endswith("; first 0.6667 before, 0.6667 after")
    assert found.metrics["merged"]["first"] == pytest.approx(2 / 3 + 5e-5)
    assert set(found.metrics["adapter"]) == {"first"}
    assert found.as_json()["rows"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_line_is_drawn_by_dtype(dtype: torch.dtype) -> None:
    probe = probe_of([[0.0, 1.0]])
    limit = TOLERANCE[dtype]
    check_same(probe, lambda x: x + 0.9 * limit, dtype, what="merged")
    with pytest.raises(RunFailedError):
        check_same(probe, lambda x: x + 1.2 * limit, dtype, what="merged")


def test_the_line_grows_with_the_outputs() -> None:
    limit = TOLERANCE[torch.bfloat16]
    check_same(probe_of([[0.0, -10.0]]), lambda x: x + 9 * limit, torch.bfloat16, what="merged")
    with pytest.raises(RunFailedError):
        check_same(
            probe_of([[0.0, -10.0]]), lambda x: x + 11 * limit, torch.bfloat16, what="merged"
        )


def test_a_tie_may_be_broken_by_rounding_and_is_counted() -> None:
    found = check_same(
        probe_of([[0.0, 1e-6], [0.0, 1.0]]),
        lambda x: x.where(x == 1.0, 0.0),
        torch.float32,
        what="merged",
    )
    assert found.agreement == 0.5
    assert "50.00 %" in found.text


def test_another_decision_is_refused() -> None:
    with pytest.raises(RunFailedError) as caught:
        check_same(probe_of([[0.0, 1.0]]), lambda x: x.flip(-1), torch.float32, what="exported")
    (problem,) = caught.value.problems
    assert problem.id == "export.differs"
    assert problem.message.startswith("The exported model must say what the adapter says")
    assert "0.00 %" in problem.message


@pytest.mark.parametrize("row", [[0.0, 1.0], [1.0, 0.0]])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(row: list[float], value: float) -> None:
    probe = probe_of([row])
    with pytest.raises(RunFailedError):
        check_same(probe, lambda x: x * value, torch.float32, what="merged")


def test_only_the_last_batch_wrong_is_found() -> None:
    probe = probe_of([[0.0, 1.0]], [[1.0, 0.0]])
    seen = SimpleNamespace(count=0)

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.count += 1
        return x if seen.count == 1 else x + 1

    with pytest.raises(RunFailedError):
        check_same(probe, model, torch.float32, what="merged")
