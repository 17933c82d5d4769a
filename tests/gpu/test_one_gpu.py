"""Number formats, the loss scaler, dropout and 8-bit moments on one GPU."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from lora_cli.config.optim import AdamW8BitConfig
from lora_cli.errors import RunFailedError
from lora_cli.lora.state import load_adapter_state
from lora_cli.training.events import CheckpointDue, EvalDone, Event, StepDone, TrainState
from lora_cli.training.memory import is_out_of_memory
from lora_cli.training.runtime import use_tf32

_spec = importlib.util.spec_from_file_location(
    "gpu_support", Path(__file__).parents[1] / "training" / "support.py"
)
assert _spec is not None
assert _spec.loader is not None
support = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(support)
build_trainer = support.build_trainer

ModelDir = Callable[..., Path]
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_few_rows_are_learned_by_heart(
    tiny_model_dir: ModelDir, toy_reviews: Path, precision: str
) -> None:
    events: list[Event] = []
    trainer = build_trainer(
        tiny_model_dir(),
        toy_reviews,
        listeners=[events.append],
        targets="all-linear",
        model_dropout=False,
        epochs=30,
        precision=precision,
    )
    assert next(trainer._plain_model.parameters()).device.type == "cuda"
    rows = trainer.plan.train[:16]
    trainer.plan = replace(trainer.plan, train=rows, validation=rows)
    trainer.run()
    evaluated = [event.metrics for event in events if isinstance(event, EvalDone)]
    assert evaluated[-1]["accuracy"] == 1.0
    assert evaluated[-1]["loss"] < 0.2


def test_a_step_that_overflows_is_left_out_and_the_scale_falls(
    tiny_model_dir: ModelDir, toy_reviews: Path
) -> None:
    trainer = build_trainer(tiny_model_dir(), toy_reviews, precision="fp16", max_steps=12)
    trainer.runtime.set_loss_scale(2.0**24, 0)
    before = trainer.adapter()
    trainer._train_step()
    after = trainer.adapter()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert trainer.runtime.loss_scale() == (2.0**23, 0)
    trainer.run()
    after = trainer.adapter()
    assert not all(torch.equal(after[name], before[name]) for name in before)


def test_an_overflow_that_no_scale_helps_against_ends_the_run(
    tiny_model_dir: ModelDir, toy_reviews: Path
) -> None:
    trainer = build_trainer(tiny_model_dir(), toy_reviews, precision="fp16", epochs=9)
    backward = trainer.runtime.backward

    def broken(loss: torch.Tensor) -> None:
        backward(loss)
        next(p for p in trainer.parameters.values() if p.grad is not None).grad.fill_(torch.inf)

    trainer.runtime.backward = broken
    with pytest.raises(RunFailedError, match="gradient must be finite"):
        trainer.run()
    assert trainer.runtime.loss_scale()[0] <= 1


WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "recompute": {"gradient_checkpointing": True},
    "noise": {"neftune_alpha": 5.0, "ema_decay": 0.9},
    "adamw_8bit": {"optimizer": AdamW8BitConfig(lr=5e-3, min_size=1)},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_with_dropout_is_bit_equal(
    tiny_model_dir: ModelDir, toy_reviews: Path, way: str
) -> None:
    states: dict[int, TrainState] = {}

    def keep(event: Event) -> None:
        if isinstance(event, CheckpointDue):
            states[event.state.progress.step] = event.state

    settings: dict[str, Any] = {"dropout": 0.1, "save_steps": 1, "micro_batch_size": 4, **WAYS[way]}
    whole = build_trainer(tiny_model_dir(), toy_reviews, listeners=[keep], **settings)
    whole.run()
    expected = whole.adapter()
    for step in (3, 8):
        # What else was drawn on the GPU meanwhile must not matter.
        torch.rand(1000, device="cuda")
        resumed = build_trainer(tiny_model_dir(), toy_reviews, **settings)
        state = states[step]
        load_adapter_state(resumed._plain_model, state.adapter, resumed._saved_modules)
        resumed.resume(state)
        resumed.run()
        found = resumed.adapter()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert resumed.state().progress == whole.state().progress


def test_losses_are_those_of_the_cpu(
    tiny_model_dir: ModelDir, toy_reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for device in ("cuda", "cpu"):
        if device == "cpu":
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
            monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        AcceleratorState._reset_state(reset_partial_state=True)
        events: list[Event] = []
        build_trainer(
            tiny_model_dir(),
            toy_reviews,
            listeners=[events.append],
            model_dropout=False,
            max_steps=6,
        ).run()
        losses.append([event.loss for event in events if isinstance(event, StepDone)])
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_tf32_rounds_products_to_three_digits() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("TF32 needs a GPU of the Ampere generation or later")
    torch.manual_seed(0)
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    exact = a.double() @ b.double()
    errors = {}
    try:
        for wanted in (True, False):
            use_tf32(wanted)
            product = (a.cuda() @ b.cuda()).cpu().double()
            errors[wanted] = ((product - exact).norm() / exact.norm()).item()
    finally:
        use_tf32(False)
    assert errors[False] < 1e-5 < errors[True] < 1e-2


def test_what_cuda_says_when_memory_runs_out_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert is_out_of_memory(caught.value)
