from types import SimpleNamespace
from typing import Any

import pytest

from lora_cli.commands.coupling import check_coupling
from lora_cli.config.commands import TrainConfig
from lora_cli.config.media import ImageTextContrastiveConfig
from lora_cli.config.sections import TrainerConfig
from lora_cli.errors import UserError


def notes(*, couples: bool = True, **settings: Any) -> list[str]:
    told: list[str] = []
    task: Any = SimpleNamespace(couples_rows=couples)
    display: Any = SimpleNamespace(note=told.append)
    trainer = TrainerConfig(**{"global_batch_size": 32, **settings})
    check_coupling(task, TrainConfig(task=ImageTextContrastiveConfig(), trainer=trainer), display)
    return told


def test_a_batch_that_is_whole_needs_no_word() -> None:
    assert notes() == notes(micro_batch_size=32) == []


def test_micro_batches_and_processes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    (told,) = notes(micro_batch_size=8)
    assert "each of the 32 of a step with the 7 others of its micro-batch alone" in told
    monkeypatch.setattr("lora_cli.commands.coupling.world_size", lambda: 2)
    (told,) = notes()
    assert "with the 15 others" in told
    assert notes(couples=False) == []


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"micro_batch_size": 1}, "trainer.micro_batch_size"),
        ({"global_batch_size": 1}, "trainer.global_batch_size"),
        ({"auto_micro_batch": True}, "trainer.auto_micro_batch"),
    ],
)
def test_a_loss_of_nothing_or_of_any_number_is_refused(settings: Any, key: str) -> None:
    with pytest.raises(UserError) as caught:
        notes(**settings)
    assert [(one.id, one.key) for one in caught.value.problems] == [("trainer.coupled-rows", key)]
    assert notes(couples=False, **settings) == []
