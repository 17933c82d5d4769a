"""What `train` prepares before it writes: nothing, and the same for the same seed."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification

from lora_cli.commands.opening import open_adapter
from lora_cli.commands.preparing import Prepared, prepare
from lora_cli.config.commands import TrainConfig
from lora_cli.config.optim import LionConfig
from lora_cli.errors import UserError
from lora_cli.tasks.single_label import SingleLabelTask


class Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)

    def table(self, *_: Any, **__: Any) -> None: ...

    def track(self, label: str, items: Sequence[Any]) -> Iterator[Any]:
        yield from items


@pytest.fixture(scope="module")
def config(tiny_run: Any) -> TrainConfig:
    return open_adapter(str(tiny_run.path), base=None).config


def run_prepare(config: TrainConfig) -> tuple[Prepared, list[str]]:
    display: Any = Notes()
    return prepare(config, display), display.texts


def trained(prepared: Prepared) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in prepared.model.named_parameters() if p.requires_grad}


def test_what_is_trained_is_adapters_and_new_modules(config: TrainConfig) -> None:
    prepared, notes = run_prepare(config)
    assert prepared.saved == ("bert.pooler", "classifier")
    assert len(prepared.targets.names) == 4
    assert all(
        "lora_" in name or name.startswith(("bert.pooler.", "classifier."))
        for name in trained(prepared)
    )
    assert len(trained(prepared)) == 4 * 2 + 4
    assert "bert.encoder.layer.0.attention.self.query" in prepared.module_names
    assert not [name for name in prepared.module_names if "lora" in name]
    total = sum(tensor.numel() for tensor in trained(prepared).values())
    assert any(f" {total:,} trained" in note for note in notes)
    assert (len(prepared.train), len(prepared.validation)) == (64, 32)


def test_the_start_depends_on_the_seed_alone(config: TrainConfig) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = trained(run_prepare(config)[0])
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    again = trained(run_prepare(config)[0])
    other = trained(run_prepare(replace(config, seed=7))[0])
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if float(first[name].abs().max()) > 0]
    assert len(drawn) == 4 + 2
    assert not [name for name in drawn if torch.equal(first[name], other[name])]


def test_problems_of_data_and_model_come_together(config: TrainConfig, tmp_path: Path) -> None:
    data = replace(config.task.data, path=str(tmp_path / "none.csv"))
    bad = replace(
        config,
        task=replace(config.task, data=data),
        model=replace(config.model, path=str(tmp_path / "none")),
    )
    with pytest.raises(UserError) as caught:
        run_prepare(bad)
    assert [problem.key for problem in caught.value.problems] == ["task.data.path", "model.path"]


def test_other_weights_than_pinned_are_refused(config: TrainConfig) -> None:
    with pytest.raises(UserError) as caught:
        run_prepare(replace(config, model=replace(config.model, sha256="0" * 64)))
    assert caught.value.problems[0].id == "model.other-weights"


def test_overfitting_uses_the_same_rows_twice(config: TrainConfig) -> None:
    trainer = replace(config.trainer, overfit_rows=5)
    prepared, notes = run_prepare(replace(config, trainer=trainer))
    ids = [row["id"] for row in prepared.train]
    assert ids == [row["id"] for row in prepared.validation] == ["1", "2", "3", "4", "5"]
    assert any("same 5 rows" in note for note in notes)


@pytest.mark.parametrize("couples", [True, False])
def test_a_loss_that_couples_rows_is_told_of(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, couples: bool
) -> None:
    monkeypatch.setattr(SingleLabelTask, "couples_rows", couples)
    trainer = replace(config.trainer, micro_batch_size=2)
    _, notes = run_prepare(replace(config, trainer=trainer))
    assert any("the loss compares rows" in note for note in notes) == couples


def test_what_cannot_be_trained_so_is_refused_before_anything_is_written(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_cli.training.optim.find_spec", lambda _: None)
    with pytest.raises(UserError, match="lion needs lion_pytorch"):
        run_prepare(replace(config, optimizer=LionConfig()))
    monkeypatch.setattr(BertForSequenceClassification, "supports_gradient_checkpointing", False)
    trainer = replace(config.trainer, gradient_checkpointing=True)
    with pytest.raises(UserError, match="must be false for bert"):
        run_prepare(replace(config, trainer=trainer))
