"""One process: what it has read is what it gets; `test_launching.py` resumes with two."""

import torch

from lora_cli.commands.phases import FirstPhase
from lora_cli.commands.sharing import share_first_phase, share_state
from lora_cli.training.events import Progress, TrainState
from lora_cli.training.group import ALONE


def test_a_state_comes_whole() -> None:
    state = TrainState(
        progress=Progress(step=3, samples=24, best_metric=0.5, best_step=2),
        adapter={"a": torch.ones(2)},
        optimizer={"a/m": torch.zeros(2)},
        method={"r": torch.ones(1)},
    )
    found = share_state(ALONE, lambda: state)
    assert found is not None
    assert found.progress == state.progress
    assert torch.equal(found.adapter["a"], state.adapter["a"])
    assert found.optimizer.keys() == {"a/m"}
    assert found.method.keys() == {"r"}
    assert share_state(ALONE, lambda: None) is None


def test_a_first_phase_comes_whole() -> None:
    phase = FirstPhase(steps=2, reason="finished", progress={"step": 2}, metrics={"loss": 1.0})
    assert share_first_phase(ALONE, lambda: phase) == phase
    assert share_first_phase(ALONE, lambda: None) is None
