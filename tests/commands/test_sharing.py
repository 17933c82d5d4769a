"""One process: what it has read is what it gets; `test_launching.py` resumes with two."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.commands.phases import FirstPhase
from lora_cli.commands.sharing import (
    check_shared_base,
    merge_shares,
    share_first_phase,
    share_state,
)
from lora_cli.errors import UserError
from lora_cli.training.events import Progress, TrainState
from lora_cli.training.group import ALONE, Group
from lora_cli.training.sharding import Sharding


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


class _Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def _config(**changed: Any) -> Any:
    values = {"strategy": "lora", "quantization": "none", "auto": False, **changed}
    return SimpleNamespace(
        strategy=SimpleNamespace(name=values["strategy"]),
        model=SimpleNamespace(quantization=values["quantization"]),
        trainer=SimpleNamespace(auto_micro_batch=values["auto"]),
    )


def test_a_base_is_spread_only_where_that_can_be_done() -> None:
    notes: Any = _Notes()
    prepared: Any = SimpleNamespace(model=nn.Linear(500, 500).requires_grad_(False))
    runtime: Any = SimpleNamespace(sharding=None, group=Group(size=2))
    check_shared_base(runtime, prepared, _config(strategy="full"), notes)
    assert notes.texts == []
    runtime.sharding = Sharding()
    check_shared_base(runtime, prepared, _config(), notes)
    assert notes.texts == ["sharded: 1.0 MB of the frozen base over 2 processes"]
    with pytest.raises(UserError) as caught:
        check_shared_base(runtime, prepared, _config(strategy="full", auto=True), notes)
    assert len(caught.value.problems) == 2
    prepared.model.requires_grad_(True)
    with pytest.raises(UserError, match="only frozen ones"):
        check_shared_base(runtime, prepared, _config(), notes)


def test_what_has_no_adapter_is_rounded() -> None:
    model = nn.Linear(2, 2)
    before = model.bias.detach().clone()
    prepared: Any = SimpleNamespace(
        model=model, applied=object(), dtypes={"weight": torch.float32, "bias": torch.bfloat16}
    )
    merge_shares(prepared)
    assert torch.equal(model.bias, before.bfloat16().float())
    prepared.applied = None
    with pytest.raises(ValueError, match="must hold LoRA layers"):
        merge_shares(prepared)
