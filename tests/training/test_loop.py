import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from lora_cli.config.optim import (
    AdafactorConfig,
    AdamW8BitConfig,
    LionConfig,
    ScheduleFreeConfig,
    SgdConfig,
)
from lora_cli.lora.state import load_adapter_state
from lora_cli.training.events import (
    CheckpointDue,
    EvalDone,
    Event,
    RunEnded,
    RunStarted,
    StepDone,
    TrainState,
)
from lora_cli.training.order import step_rows

_spec = importlib.util.spec_from_file_location(
    "loop_support", Path(__file__).with_name("support.py")
)
assert _spec is not None
assert _spec.loader is not None
support = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(support)
build_trainer = support.build_trainer

ModelDir = Callable[..., Path]


def steps(events: list[Event]) -> list[StepDone]:
    return [event for event in events if isinstance(event, StepDone)]


def evals(events: list[Event]) -> list[EvalDone]:
    return [event for event in events if isinstance(event, EvalDone)]


def memorise(tiny_model_dir: ModelDir, data: Path, **settings: Any) -> list[Event]:
    """Train on 16 rows, validate on the same."""
    events: list[Event] = []
    trainer = build_trainer(
        tiny_model_dir(),
        data,
        listeners=[events.append],
        targets="all-linear",
        model_dropout=False,
        epochs=30,
        **settings,
    )
    rows = trainer.plan.train[:16]
    trainer.plan = replace(trainer.plan, train=rows, validation=rows)
    trainer.run()
    return events


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_few_rows_are_learned_by_heart(
    tiny_model_dir: ModelDir, toy_reviews: Path, precision: str
) -> None:
    events = memorise(tiny_model_dir, toy_reviews, precision=precision)
    first, last = evals(events)[0], evals(events)[-1]
    assert first.step == 0
    assert first.metrics["accuracy"] < 0.9
    assert last.metrics["accuracy"] == 1.0
    assert last.metrics["loss"] < 0.2
    assert isinstance(events[0], RunStarted)
    assert isinstance(events[-1], RunEnded)


def test_one_step_equals_plain_torch(tiny_model_dir: ModelDir, toy_reviews: Path) -> None:
    """The whole step against autograd, AdamW and clipping written out over one padded batch."""
    events: list[Any] = []
    ours = build_trainer(
        tiny_model_dir(),
        toy_reviews,
        max_steps=1,
        micro_batch_size=3,
        model_dropout=False,
        listeners=[events.append],
    )
    theirs = build_trainer(tiny_model_dir(), toy_reviews, max_steps=1, model_dropout=False)
    model, parameters = theirs._plain_model, theirs.parameters
    _, indices = step_rows(64, seed=7, global_batch_size=8, step=0)
    batch = theirs.task.collate([theirs.plan.train[index] for index in indices])
    logits = model(**batch["inputs"]).logits
    functional.cross_entropy(logits, batch["labels"]).backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    # One step of 1 with 6 % warm-up is all warm-up: (0 + 1) / (1 + 1) of the peak.
    optimizer = torch.optim.AdamW(parameters.values(), lr=5e-3 / 2, weight_decay=0.0)
    optimizer.step()

    ours.run()
    for name, parameter in ours.parameters.items():
        torch.testing.assert_close(parameter, parameters[name], rtol=1e-4, atol=1e-6)
    # Neither AdamW nor clipping minds a gradient that was not divided by the rows.
    (found,) = (event.grad_norm for event in events if hasattr(event, "grad_norm"))
    assert found == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize("micro", [1, 2, 3, 5, 8])
def test_micro_batches_leave_the_gradient_as_it_is(
    tiny_model_dir: ModelDir, toy_reviews: Path, micro: int
) -> None:
    gradients = []
    for size in (None, micro):
        trainer = build_trainer(
            tiny_model_dir(), toy_reviews, micro_batch_size=size, model_dropout=False
        )
        # The last window of an epoch of 64 rows in batches of 8, cut short to 5.
        count = trainer._backward(trainer.plan.train[:5])[1]
        trainer._scale_gradients(count)
        gradients.append({name: p.grad for name, p in trainer.parameters.items()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


def run_to_end(trainer: Any) -> dict[str, torch.Tensor]:
    trainer.run()
    return dict(trainer.adapter())


WAYS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"optimizer": SgdConfig(lr=0.01)},
    "adafactor": {"optimizer": AdafactorConfig()},
    "lion": {"optimizer": LionConfig(lr=1e-3, weight_decay=0.1)},
    "schedule_free": {"optimizer": ScheduleFreeConfig(lr=5e-3, lora_plus_ratio=4.0)},
    "adamw_8bit": {"optimizer": AdamW8BitConfig(lr=5e-3, min_size=1)},
    "ema": {"ema_decay": 0.9},
    "noise": {"neftune_alpha": 5.0, "label_smoothing": 0.1},
    "recompute": {"gradient_checkpointing": True},
    "all": {
        "optimizer": LionConfig(lr=1e-3, weight_decay_b=0.1),
        "ema_decay": 0.8,
        "neftune_alpha": 5.0,
        "label_smoothing": 0.2,
        "gradient_checkpointing": True,
        "precision": "bf16",
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_bit_equal(tiny_model_dir: ModelDir, toy_reviews: Path, way: str) -> None:
    states: dict[int, TrainState] = {}

    def keep(event: Event) -> None:
        if isinstance(event, CheckpointDue):
            states[event.state.progress.step] = event.state

    settings = {"dropout": 0.1, "epochs": 2, "save_steps": 1, "micro_batch_size": 4, **WAYS[way]}
    whole = build_trainer(tiny_model_dir(), toy_reviews, listeners=[keep], **settings)
    expected = run_to_end(whole)
    assert sorted(states) == list(range(1, 17))
    # Mid-epoch, at the end of the first epoch, and just before the end of the run.
    for step in (3, 8, 15) if way == "adamw" else (11,):
        resumed = build_trainer(tiny_model_dir(), toy_reviews, **settings)
        state = states[step]
        for name, parameter in resumed.parameters.items():
            parameter.data.copy_(state.adapter[name])
        resumed.resume(state)
        found = run_to_end(resumed)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert resumed.progress == whole.progress
        average, saved = whole.averaged_adapter(), resumed.averaged_adapter()
        assert all(torch.equal(saved[name], average[name]) for name in average)
        ours, theirs = resumed.state().optimizer, whole.state().optimizer
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_evaluation_and_saving_take_the_average(
    tiny_model_dir: ModelDir, toy_reviews: Path
) -> None:
    for settings in ({"ema_decay": 0.9}, {"optimizer": ScheduleFreeConfig(lr=0.05)}):
        events: list[Event] = []
        trainer = build_trainer(
            tiny_model_dir(), toy_reviews, listeners=[events.append], max_steps=8, **settings
        )
        trainer.run()
        best = next(event for event in evals(events) if event.is_best)
        average, last = trainer.averaged_adapter(), trainer.adapter()
        assert all(torch.equal(best.adapter[name], average[name]) for name in average)
        assert not all(torch.equal(last[name], average[name]) for name in average)
        load_adapter_state(trainer._plain_model, best.adapter, trainer._saved_modules)
        metrics = trainer.evaluate().metrics(trainer.task)
        assert metrics == best.metrics


def test_averages_and_schedule_free_are_not_changed_by_evaluating(
    tiny_model_dir: ModelDir, toy_reviews: Path
) -> None:
    for settings in ({"ema_decay": 0.9}, {"optimizer": ScheduleFreeConfig(lr=0.01)}):
        runs = [
            build_trainer(tiny_model_dir(), toy_reviews, max_steps=6, eval_steps=every, **settings)
            for every in (6, 1)
        ]
        first, second = (run_to_end(trainer) for trainer in runs)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_for_training_alone_leaves_evaluation_as_it_is(
    tiny_model_dir: ModelDir, toy_reviews: Path
) -> None:
    plain = build_trainer(tiny_model_dir(), toy_reviews)
    changed = build_trainer(
        tiny_model_dir(),
        toy_reviews,
        label_smoothing=0.3,
        neftune_alpha=10.0,
        gradient_checkpointing=True,
    )
    assert changed.evaluate().metrics(changed.task) == plain.evaluate().metrics(plain.task)
    losses = [trainer._backward(trainer.plan.train[:8])[0] for trainer in (plain, changed)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_times_add_up_over_sessions(
    tiny_model_dir: ModelDir, toy_reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that ticks once a reading, against counts of its readings."""
    clock = itertools.count(1000.0)
    monkeypatch.setattr("lora_cli.training.loop.time.monotonic", lambda: next(clock))
    events: list[Event] = []
    settings: dict[str, Any] = {"max_steps": 5, "save_steps": 3, "eval_steps": 5}
    first = build_trainer(tiny_model_dir(), toy_reviews, listeners=[events.append], **settings)
    ended = first.run()
    saved = next(event.state.progress for event in events if isinstance(event, CheckpointDue))
    # Each step takes one tick, and 5 steps of 8 rows are 40 rows.
    assert (saved.step, saved.train_seconds, ended.samples_per_second) == (3, 3.0, 8.0)
    # Steps 4 and 5 read the clock twice each, the second saving and the end once.
    assert ended.seconds == saved.seconds + 6

    second = build_trainer(tiny_model_dir(), toy_reviews, **settings)
    second.resume(
        TrainState(
            replace(saved, seconds=100.0, train_seconds=37.0),
            first.adapter(),
            first.state().optimizer,
        )
    )
    resumed = second.run()
    assert resumed.samples_per_second == 40 / (37 + 2)
    assert resumed.seconds == 100.0 + (ended.seconds - saved.seconds)
    # Times do not make two states differ.
    assert second.progress == replace(second.progress, seconds=0.0, train_seconds=0.0)


def test_evaluation_does_not_change_training(tiny_model_dir: ModelDir, toy_reviews: Path) -> None:
    rare = build_trainer(tiny_model_dir(), toy_reviews, dropout=0.2, eval_steps=16)
    often = build_trainer(tiny_model_dir(), toy_reviews, dropout=0.2, eval_steps=1)
    first, second = run_to_end(rare), run_to_end(often)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_when_to_evaluate_save_and_log(tiny_model_dir: ModelDir, toy_reviews: Path) -> None:
    events: list[Event] = []
    trainer = build_trainer(
        tiny_model_dir(),
        toy_reviews,
        listeners=[events.append],
        max_steps=10,
        eval_steps=4,
        save_steps=3,
        log_steps=5,
    )
    trainer.run()
    saved = [event.state.progress.step for event in events if isinstance(event, CheckpointDue)]
    assert [event.step for event in evals(events)] == [0, 4, 8, 10]
    # Each new best is saved as well.
    best = {event.step for event in evals(events) if event.is_best}
    assert saved == sorted({3, 6, 9, 10} | best)
    assert [event.step for event in steps(events) if event.log] == [1, 5, 10]
    assert len(steps(events)) == 10
    assert all(event.samples_per_second > 0 for event in steps(events))


def test_early_stopping_counts_evaluations_without_improvement(
    tiny_model_dir: ModelDir, toy_reviews: Path
) -> None:
    from lora_cli.config.sections import EarlyStoppingConfig

    events: list[Event] = []
    trainer = build_trainer(
        tiny_model_dir(),
        toy_reviews,
        listeners=[events.append],
        epochs=50,
        early_stopping=EarlyStoppingConfig(patience=2, threshold=0.6),
    )
    ended = trainer.run()
    # No accuracy can rise by 0.6 over the first one of a model that has trained for an epoch.
    assert ended.reason == "early stopping"
    assert [event.step for event in evals(events)] == [0, 8, 16, 24]

    resumed = build_trainer(
        tiny_model_dir(), toy_reviews, epochs=50, early_stopping=trainer.plan.trainer.early_stopping
    )
    resumed.resume(trainer.state())
    assert (resumed.run().reason, resumed.progress.step) == ("early stopping", 24)


def test_the_best_checkpoint_is_the_best_one(tiny_model_dir: ModelDir, toy_reviews: Path) -> None:
    events: list[Event] = []
    build_trainer(tiny_model_dir(), toy_reviews, listeners=[events.append], epochs=4).run()
    best = [event for event in evals(events) if event.is_best]
    values = [event.metrics["accuracy"] for event in evals(events) if event.step]
    assert not evals(events)[0].is_best
    assert best[-1].metrics["accuracy"] == max(values)
    assert all(event.adapter for event in best)


def test_a_stop_request_saves_and_ends(tiny_model_dir: ModelDir, toy_reviews: Path) -> None:
    events: list[Event] = []
    trainer = build_trainer(tiny_model_dir(), toy_reviews, listeners=[events.append])
    trainer._should_stop = lambda: trainer.progress.step >= 5
    ended = trainer.run()
    saved = [event.state.progress.step for event in events if isinstance(event, CheckpointDue)]
    assert (ended.reason, ended.step, saved) == ("stopped", 5, [5])
