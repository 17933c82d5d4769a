"""Stop requests, within evaluations too: nothing is lost, and what was due is made up for."""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.lora.state import load_adapter_state
from lora_cli.training.evaluation import EvaluationStopped
from lora_cli.training.events import (
    CheckpointDue,
    EvalDone,
    EvalProgress,
    Event,
    Progress,
    RunEnded,
    StepDone,
    TrainState,
)

_spec = importlib.util.spec_from_file_location(
    "loop_stops_support", Path(__file__).with_name("support.py")
)
assert _spec is not None
assert _spec.loader is not None
support = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(support)

ModelDir = Callable[..., Path]
# Four steps in two epochs; each of the three evaluations has four batches.
SETTINGS = {"epochs": 2, "global_batch_size": 32, "eval_batch_size": 8}


def build(model: Path, data: Path, events: list[Event], *, stop_after: int | None = None) -> Any:
    """Return a trainer that is asked to stop after so many batches of evaluations."""
    trainer = support.build_trainer(model, data, listeners=[events.append], dropout=0.1, **SETTINGS)

    def should_stop() -> bool:
        done = sum(isinstance(event, EvalProgress) for event in events)
        return stop_after is not None and done >= stop_after

    trainer._should_stop = should_stop
    return trainer


def evaluations(events: list[Event]) -> list[tuple[int, dict[str, float]]]:
    return [(x.step, dict(x.metrics)) for x in events if isinstance(x, EvalDone)]


def checkpoints(events: list[Event]) -> list[Any]:
    return [x.state for x in events if isinstance(x, CheckpointDue)]


@pytest.mark.parametrize("stop_after", [5, 7, 8, 9, 11])
def test_the_run_goes_on_as_if_nothing_had_been(
    tiny_model_dir: ModelDir, toy_reviews: Path, stop_after: int
) -> None:
    model, expected = tiny_model_dir(), list[Event]()
    whole = build(model, toy_reviews, expected)
    whole.run()

    first: list[Event] = []
    ended = build(model, toy_reviews, first, stop_after=stop_after).run()
    assert ended.reason == "stopped"
    assert ended.step == (2 if stop_after <= 8 else 4)
    state = checkpoints(first)[-1]
    assert state.progress.evaluation_due is (stop_after != 8)
    assert state.progress.step == ended.step

    second: list[Event] = []
    trainer = build(model, toy_reviews, second)
    load_adapter_state(trainer._plain_model, dict(state.adapter), trainer._saved_modules)
    trainer.resume(state)
    assert trainer.run().reason == "finished"
    assert evaluations(first) + evaluations(second) == evaluations(expected)
    final = checkpoints([*first, *second])[-1]
    assert final.progress == checkpoints(expected)[-1].progress
    assert not final.progress.evaluation_due
    for name, tensor in whole.adapter().items():
        assert torch.equal(tensor, trainer.adapter()[name])


def test_a_stop_before_the_first_step_saves_nothing(
    tiny_model_dir: ModelDir, toy_reviews: Path
) -> None:
    events: list[Event] = []
    ended = build(tiny_model_dir(), toy_reviews, events, stop_after=2).run()
    assert (ended.step, ended.reason) == (0, "stopped")
    assert checkpoints(events) == []
    assert evaluations(events) == []
    assert isinstance(events[-1], RunEnded)


def test_an_evaluation_outside_of_training_is_given_up(
    tiny_model_dir: ModelDir, toy_reviews: Path
) -> None:
    events: list[Event] = []
    trainer = build(tiny_model_dir(), toy_reviews, events, stop_after=2)
    with pytest.raises(EvaluationStopped):
        trainer.evaluate()
    assert sum(isinstance(event, EvalProgress) for event in events) == 2


def reports(events: list[Event]) -> list[Any]:
    """Return what is logged of the steps, without speed."""
    return [replace(x, samples_per_second=0.0) for x in events if isinstance(x, StepDone) and x.log]


@pytest.mark.parametrize("forgets", [False, True])
def test_the_reported_loss_does_not_depend_on_stops(
    tiny_model_dir: ModelDir, toy_reviews: Path, forgets: bool
) -> None:
    model, settings = tiny_model_dir(), {"log_steps": 3, "save_steps": 2, "eval_steps": 4}

    def trainer(events: list[Event]) -> Any:
        return support.build_trainer(
            model, toy_reviews, listeners=[events.append], dropout=0.1, max_steps=8, **settings
        )

    expected: list[Event] = []
    whole = trainer(expected)
    whole.run()
    assert [x.step for x in reports(expected)] == [1, 3, 6, 8]

    found: list[Event] = []
    state: TrainState | None = None
    for step in range(1, 9):
        session = trainer(found)
        if step < 8:
            session._should_stop = lambda it=session, step=step: it.progress.step >= step
        if state is not None:
            load_adapter_state(session._plain_model, dict(state.adapter), session._saved_modules)
            session.resume(state)
        assert session.run().step == step
        state = checkpoints(found)[-1]
        if forgets:
            # As checkpoints of earlier versions have it.
            values = asdict(state.progress)
            del values["loss_sum"], values["loss_count"]
            state = replace(state, progress=Progress(**values))
    assert (reports(found) == reports(expected)) is not forgets
    assert forgets or checkpoints(found)[-1].progress == checkpoints(expected)[-1].progress
    assert session.progress == whole.progress
