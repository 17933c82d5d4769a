"""Numbers that are not finite, and memory that runs out, in the loop."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.errors import RunFailedError
from lora_cli.lora.state import load_adapter_state
from lora_cli.tasks.contract import StepOutput
from lora_cli.training.events import (
    BatchHalved,
    CheckpointDue,
    EvalDone,
    Event,
    StepDone,
    TrainState,
)

_spec = importlib.util.spec_from_file_location(
    "loop_faults_support", Path(__file__).with_name("support.py")
)
assert _spec is not None
assert _spec.loader is not None
support = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(support)
build_trainer = support.build_trainer

ModelDir = Callable[..., Path]


def limit_memory(trainer: Any, *, train: int = 99, evaluation: int = 99) -> list[int]:
    """Let batches of more rows run out of memory halfway; return the sizes that were tried."""
    forward, tried = trainer.task.forward, list[int]()

    def limited(model: Any, batch: Any) -> StepOutput:
        rows = len(batch["ids"])
        output: StepOutput = forward(model, batch)
        if model.training:
            tried.append(rows)
        if rows > (train if model.training else evaluation):
            if model.training:
                # Gradients of an earlier micro-batch of the step must not count twice.
                output.loss_sum.backward()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return output

    trainer.task.forward = limited
    return tried


def states_of(events: list[Event]) -> dict[int, TrainState]:
    return {e.state.progress.step: e.state for e in events if isinstance(e, CheckpointDue)}


def test_micro_batches_are_halved_with_the_same_gradients(
    tiny_model_dir: ModelDir, toy_reviews: Path
) -> None:
    settings: dict[str, Any] = {"model_dropout": False, "max_steps": 4, "save_steps": 1}
    events: list[Event] = []
    plain: list[Event] = []
    build_trainer(tiny_model_dir(), toy_reviews, listeners=[plain.append], **settings).run()
    halving = build_trainer(
        tiny_model_dir(),
        toy_reviews,
        listeners=[events.append],
        auto_micro_batch=True,
        **settings,
    )
    tried = limit_memory(halving, train=2)
    halving.run()
    assert tried == [8, 4, *[2] * 16]
    told = [event for event in events if isinstance(event, BatchHalved)]
    assert told == [BatchHalved(0, "train", 4), BatchHalved(0, "train", 2)]
    losses = [[e.loss for e in seen if isinstance(e, StepDone)] for seen in (plain, events)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, expected in states_of(plain)[4].adapter.items():
        torch.testing.assert_close(states_of(events)[4].adapter[name], expected, atol=1e-4, rtol=0)
    assert states_of(events)[1].progress.micro_batch_size == 2
    assert halving.sizes.halved() == {"micro_batch_size": 2}


def test_a_resumed_run_begins_with_what_was_found(
    tiny_model_dir: ModelDir, toy_reviews: Path
) -> None:
    settings: dict[str, Any] = {"dropout": 0.1, "max_steps": 5, "save_steps": 1}
    settings |= {"auto_micro_batch": True}
    events: list[Event] = []
    whole = build_trainer(tiny_model_dir(), toy_reviews, listeners=[events.append], **settings)
    limit_memory(whole, train=4, evaluation=16)
    whole.run()
    state = states_of(events)[2]
    resumed = build_trainer(tiny_model_dir(), toy_reviews, **settings)
    tried = limit_memory(resumed, train=4, evaluation=16)
    load_adapter_state(resumed._plain_model, dict(state.adapter), resumed._saved_modules)
    resumed.resume(state)
    resumed.run()
    assert tried == [4] * 6
    expected, found = whole.adapter(), resumed.adapter()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert resumed.sizes.halved() == {"micro_batch_size": 4, "eval_batch_size": 16}
    # The step that did not fit has begun anew, dropout included.
    small = build_trainer(tiny_model_dir(), toy_reviews, micro_batch_size=4, **settings)
    small.run()
    assert all(torch.equal(small.adapter()[name], expected[name]) for name in expected)


def test_batches_of_evaluation_are_halved_with_the_same_metrics(
    tiny_model_dir: ModelDir, toy_reviews: Path
) -> None:
    metrics = []
    for limit in (99, 5):
        events: list[Event] = []
        trainer = build_trainer(
            tiny_model_dir(),
            toy_reviews,
            listeners=[events.append],
            max_steps=1,
            auto_micro_batch=True,
        )
        limit_memory(trainer, evaluation=limit)
        trainer.run()
        metrics.append([e.metrics for e in events if isinstance(e, EvalDone)])
        halved = [event.rows for event in events if isinstance(event, BatchHalved)]
        assert halved == ([32, 16, 8, 4] if limit == 5 else [])
    for first, second in zip(*metrics, strict=True):
        assert first == pytest.approx(second, rel=1e-5)


def test_without_leave_to_halve_the_error_says_how(
    tiny_model_dir: ModelDir, toy_reviews: Path
) -> None:
    trainer = build_trainer(tiny_model_dir(), toy_reviews)
    limit_memory(trainer, train=4)
    with pytest.raises(RunFailedError) as caught:
        trainer.run()
    (problem,) = caught.value.problems
    assert problem.id == "train.out-of-memory"
    assert "set trainer.micro_batch_size=4: 2 micro-batches per step" in str(problem.fix)


def break_at(trainer: Any, step: int, what: str) -> None:
    """Make something infinite or NaN at a step, counted from 1."""
    forward, parameter = trainer.task.forward, next(iter(trainer.parameters.values()))

    def broken(model: Any, batch: Any) -> StepOutput:
        output: StepOutput = forward(model, batch)
        if trainer.progress.step != step - 1 or not model.training:
            return output
        loss = output.loss_sum
        if what == "loss":
            loss = loss * math.nan
        else:
            # A square root of zero: its value is fine, and its slope is not.
            loss = loss + (parameter - parameter.detach()).sum().sqrt()
        return StepOutput(loss, output.count, output.outputs)

    if what in ("loss", "gradient"):
        trainer.task.forward = broken
        return
    act = trainer._descent.step

    def corrupt(lr: float) -> bool:
        moved: bool = act(lr)
        if trainer.progress.step == step - 1:
            values = parameter.data
            if what == "moment":
                values = trainer._descent._plain.state[parameter]["exp_avg"]
            values.flatten()[0] = math.inf
        return moved

    trainer._descent.step = corrupt


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("what", ["loss", "gradient", "weight", "moment"])
def test_nothing_that_is_not_finite_is_saved_or_evaluated(
    tiny_model_dir: ModelDir, toy_reviews: Path, what: str, step: int
) -> None:
    events: list[Event] = []
    trainer = build_trainer(
        tiny_model_dir(), toy_reviews, listeners=[events.append], save_steps=1, eval_steps=1
    )
    break_at(trainer, step, what)
    with pytest.raises(RunFailedError) as caught:
        trainer.run()
    (problem,) = caught.value.problems
    assert problem.id == "train.not-finite"
    if what in ("loss", "gradient"):
        assert f"The {what} must be finite, but is not at step {step}." in problem.message
        assert str(problem.where).startswith("rows with id ")
    else:
        assert f"not after step {step}." in problem.message
        assert str(problem.where).split("/")[0] in trainer.parameters
    assert sorted(states_of(events)) == list(range(1, step))
    for state in states_of(events).values():
        for tensors in (state.adapter, state.optimizer):
            assert all(bool(torch.isfinite(x).all()) for x in tensors.values())
    # A moment does no harm to the evaluation of its step.
    evaluated = [event.step for event in events if isinstance(event, EvalDone)]
    assert evaluated == list(range(step + (what == "moment")))


def test_weights_that_went_bad_between_checkpoints_stop_the_next_step(
    tiny_model_dir: ModelDir, toy_reviews: Path
) -> None:
    trainer = build_trainer(tiny_model_dir(), toy_reviews, save_steps=9)
    break_at(trainer, 2, "weight")
    with pytest.raises(RunFailedError, match="at step 3"):
        trainer.run()


def test_a_loss_that_is_not_finite_stops_before_the_step(
    tiny_model_dir: ModelDir, toy_reviews: Path
) -> None:
    trainer = build_trainer(tiny_model_dir(), toy_reviews)
    forward = trainer.task.forward
    before: dict[str, torch.Tensor] = {}

    def broken(model: Any, batch: Any) -> StepOutput:
        output: StepOutput = forward(model, batch)
        if trainer.progress.step < 2 or not model.training:
            return output
        before.update(trainer.adapter())
        return StepOutput(output.loss_sum * math.nan, output.count, output.outputs)

    trainer.task.forward = broken
    with pytest.raises(RunFailedError, match="not at step 3"):
        trainer.run()
    assert all(torch.equal(before[name], value) for name, value in trainer.adapter().items())
