"""The loss scaler of fp16 in the loop, on the CPU: float32 overflows too when scaled enough."""

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.errors import RunFailedError
from lora_cli.lora.state import load_adapter_state
from lora_cli.training.events import CheckpointDue, Event, TrainState
from lora_cli.training.runtime import Runtime

_spec = importlib.util.spec_from_file_location(
    "loop_scaler_support", Path(__file__).with_name("support.py")
)
assert _spec is not None
assert _spec.loader is not None
support = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(support)

ModelDir = Callable[..., Path]
START = 2.0**100
# Gradients in float32 overflow from 2**128 on.
MORE = 2.0**30


class ScaledRuntime(Runtime):
    """A runtime whose loss is scaled, by so much at first that gradients overflow."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=START, growth_interval=3)

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss * MORE)

    def unscale(self, optimizer: Any) -> None:
        self._accelerator.scaler.unscale_(optimizer.optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.div_(MORE)


@pytest.fixture
def build(
    tiny_model_dir: ModelDir, toy_reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    monkeypatch.setattr(support, "Runtime", ScaledRuntime)

    def build(**settings: Any) -> Any:
        return support.build_trainer(tiny_model_dir(), toy_reviews, dropout=0.1, **settings)

    return build


def test_steps_that_overflow_are_left_out_and_the_scale_is_resumed(
    build: Callable[..., Any],
) -> None:
    states: dict[int, TrainState] = {}

    def keep(event: Event) -> None:
        if isinstance(event, CheckpointDue):
            states[event.state.progress.step] = event.state

    whole = build(listeners=[keep], save_steps=1, ema_decay=0.9)
    start = whole.adapter()
    whole.run()
    scales = [states[step].progress.loss_scale for step in range(1, 17)]
    skipped = [step for step in range(1, 17) if scales[step - 1] < ([START, *scales])[step - 1]]
    # It fell at first, and rose and fell again later on.
    assert skipped[0] == 1
    assert len(skipped) > 3
    assert any(later > sooner for sooner, later in itertools.pairwise(scales))
    assert all(torch.equal(states[1].adapter[name], start[name]) for name in start)
    last = states[16].adapter
    assert not all(torch.equal(last[name], start[name]) for name in start)
    for step in (2, 9):
        resumed = build(save_steps=1, ema_decay=0.9)
        state = states[step]
        load_adapter_state(resumed._plain_model, state.adapter, resumed._saved_modules)
        resumed.resume(state)
        resumed.run()
        found = resumed.adapter()
        assert all(torch.equal(found[name], last[name]) for name in last)
        assert resumed.state().progress == states[16].progress


def test_an_overflow_that_no_scale_helps_against_ends_the_run(build: Callable[..., Any]) -> None:
    trainer = build(epochs=2)
    trainer.runtime.set_loss_scale(8.0, 0)
    backward = trainer.runtime.backward

    def broken(loss: torch.Tensor) -> None:
        backward(loss)
        next(p for p in trainer.parameters.values() if p.grad is not None).grad.fill_(torch.inf)

    trainer.runtime.backward = broken
    with pytest.raises(RunFailedError, match="gradient must be finite, but is not at step 4"):
        trainer.run()
    assert trainer.runtime.loss_scale() == (1.0, 0)
