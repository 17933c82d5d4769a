"""The bookkeeping between two trainers of one run; the runs themselves are in test_strategies."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.commands.phases import (
    LOG,
    FirstPhase,
    merged_state,
    prepare_full,
    read_first_phase,
    second_phase,
    shift_state,
    shifted,
    write_first_phase,
)
from lora_cli.commands.preparing import prepare
from lora_cli.config.commands import TrainConfig
from lora_cli.config.optim import AdamWConfig
from lora_cli.config.strategies import LoraThenFullStrategyConfig
from lora_cli.errors import UserError
from lora_cli.lora.state import adapter_state
from lora_cli.training.events import (
    BatchHalved,
    CheckpointDue,
    EvalDone,
    EvalProgress,
    EvalStarted,
    Event,
    Progress,
    RunEnded,
    RunStarted,
    StepDone,
    TrainState,
)

PROGRESS = Progress(
    step=7, samples=70, best_metric=0.5, best_step=4, evaluations_without_improvement=2, seconds=3.0
)
PHASE = FirstPhase(
    steps=7, reason="early stopping", progress=asdict(PROGRESS), metrics={"accuracy": 0.5}
)


def test_the_first_phase_comes_back_from_its_file(tmp_path: Path) -> None:
    assert read_first_phase(tmp_path) is None
    write_first_phase(tmp_path, PHASE)
    assert read_first_phase(tmp_path) == PHASE


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"steps": 1}'])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / LOG).write_text(text)
    with pytest.raises(UserError, match="must say where the first phase ended"):
        read_first_phase(tmp_path)


def test_the_second_phase_goes_on_counting_and_waits_anew() -> None:
    begun = PHASE.begin()
    assert begun.step == 0
    assert begun.best_step == -3
    assert (begun.samples, begun.best_metric, begun.seconds) == (70, 0.5, 3.0)
    assert begun.evaluations_without_improvement == 0
    ended = RunEnded(step=19, reason="finished", seconds=9.0, samples_per_second=1.0)
    assert PHASE.as_json(ended) == {
        "phases": [
            {"strategy": "lora", "steps": 7, "reason": "early stopping"},
            {"strategy": "full", "steps": 12, "reason": "finished"},
        ]
    }


def test_listeners_hear_of_steps_since_the_start_of_the_run() -> None:
    heard: list[Event] = []
    tell = shifted(heard.append, 10, steps_per_epoch=4)
    state = TrainState(progress=replace(PROGRESS, step=2, best_step=1), adapter={}, optimizer={})
    tell(RunStarted(first_step=0, total_steps=6, steps_per_epoch=4, train_rows=16))
    tell(StepDone(step=2, epoch=0.5, loss=1, lr=1, grad_norm=1, samples_per_second=1, log=True))
    tell(EvalStarted(step=2, rows=3))
    tell(EvalProgress(3))
    tell(EvalDone(step=2, metrics={"accuracy": 1.0}, metric="accuracy", is_best=True))
    tell(BatchHalved(2, "train", 4))
    tell(CheckpointDue(state))
    tell(RunEnded(step=6, reason="finished", seconds=1.0, samples_per_second=1.0))
    started, step, evaluating, progress, evaluated, halved, checkpoint, ended = heard
    assert isinstance(started, RunStarted)
    assert (started.first_step, started.total_steps, started.steps_per_epoch) == (10, 16, 4)
    assert isinstance(step, StepDone)
    assert (step.step, step.epoch) == (12, 3.0)
    assert isinstance(evaluating, EvalStarted)
    assert evaluating.step == 12
    assert progress == EvalProgress(3)
    assert isinstance(evaluated, EvalDone)
    assert (evaluated.step, evaluated.metrics) == (12, {"accuracy": 1.0})
    assert halved == BatchHalved(12, "train", 4)
    assert isinstance(checkpoint, CheckpointDue)
    assert (checkpoint.state.progress.step, checkpoint.state.progress.best_step) == (12, 11)
    assert shift_state(checkpoint.state, -10) == state
    assert isinstance(ended, RunEnded)
    assert ended.step == 16


def test_the_second_phase_has_its_own_length_and_rate() -> None:
    config = TrainConfig(
        strategy=LoraThenFullStrategyConfig(full_lr=3e-5, full_epochs=2),
        optimizer=AdamWConfig(lr=1e-3, lora_plus_ratio=16.0, weight_decay=0.1),
    )
    config = replace(config, trainer=replace(config.trainer, max_steps=100))
    second = second_phase(config)
    assert second.optimizer == AdamWConfig(lr=3e-5, weight_decay=0.1)
    assert (second.trainer.epochs, second.trainer.max_steps) == (2, None)
    with pytest.raises(ValueError, match="one phase"):
        second_phase(TrainConfig())


class Quiet:
    def note(self, text: str) -> None: ...

    def table(self, *_: Any, **__: Any) -> None: ...

    def track(self, label: str, items: Any) -> Any:
        return items


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_weight_of_the_merged_model_is_trained_in_float32(
    tiny_run: Any, tiny_model_dir: Any, dtype: str
) -> None:
    """Merged against W + scale * B A in float64, on a base whose coarse steps would lose it."""
    from lora_cli.commands.opening import open_adapter

    config = open_adapter(str(tiny_run.path), base=None).config
    base = tiny_model_dir(dtype=dtype)
    config = replace(
        config,
        model=replace(config.model, path=str(base)),
        strategy=LoraThenFullStrategyConfig(),
        trainer=replace(config.trainer, padding_free=False),
    )
    display: Any = Quiet()
    prepared = prepare(config, display)
    torch.manual_seed(0)
    state = {
        name: torch.randn_like(tensor) * 0.01
        for name, tensor in adapter_state(prepared.model, prepared.saved).items()
    }
    merged = merged_state(prepared, state)
    full = prepare_full(prepared, config, merged)
    names = {name for name, _ in full.model.named_parameters()}
    assert {n for n, p in full.model.named_parameters() if p.requires_grad} == names
    assert {p.dtype for p in full.model.parameters()} == {torch.float32}
    assert adapter_state(full.model, full.saved).keys() == names
    layer = "bert.encoder.layer.1.attention.self.value"
    fresh = prepare(config, display).model.get_submodule(layer)
    weight = fresh.base_layer.weight.double()  # type: ignore[union-attr, operator]
    A, B = (state[f"{layer}.lora_{part}.weight"].double() for part in "AB")
    expected = weight + config.lora.alpha / config.lora.r * B @ A
    found = full.model.get_parameter(f"{layer}.weight").double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    head = full.model.get_parameter("classifier.weight")
    assert torch.equal(head, state["classifier.weight"])
    # Nothing of the first phase is left, such as its casts between frozen and trained parts.
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in full.model.modules())
    free = prepare_full(replace(prepared, padding_free=True), config, None).model
    assert free.bert.encoder.layer[0]._forward_pre_hooks
