"""Twenty steps on the CPU: the loss of each is written down, so that no change of it is silent."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from lora_cli.training.events import Event, StepDone

STORED = Path(__file__).with_name("golden_loss.json")


def _support() -> ModuleType:
    path = Path(__file__).parents[1] / "training" / "support.py"
    spec = importlib.util.spec_from_file_location("golden_support", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("micro", [None, 2])
def test_twenty_steps(
    tiny_model_dir: Callable[..., Path], toy_reviews: Path, micro: int | None
) -> None:
    events: list[Event] = []
    trainer = _support().build_trainer(
        tiny_model_dir(),
        toy_reviews,
        listeners=[events.append],
        targets="all-linear",
        max_steps=20,
        micro_batch_size=micro,
        model_dropout=False,
    )
    trainer.run()
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    if os.environ.get("UPDATE_SNAPSHOTS") and micro is None:
        STORED.write_text(json.dumps([round(loss, 6) for loss in losses], indent=1) + "\n")
    stored = json.loads(STORED.read_text())
    assert len(losses) == 20
    assert losses == pytest.approx(stored, abs=2e-4)
    assert stored[-1] != stored[0]
