"""Training without padding as a setting of a run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from lora_cli.commands.opening import open_adapter
from lora_cli.commands.padding import choose_padding
from lora_cli.commands.preparing import prepare
from lora_cli.config.commands import TrainConfig
from lora_cli.errors import UserError
from lora_cli.training.sharding import Sharding


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


def changed(config: TrainConfig, **settings: Any) -> TrainConfig:
    return replace(config, trainer=replace(config.trainer, **settings))


@pytest.mark.parametrize(("wanted", "expected"), [("auto", True), (True, True), (False, False)])
def test_a_run_trains_without_padding(config: TrainConfig, wanted: Any, expected: bool) -> None:
    display: Any = Notes()
    prepared = prepare(changed(config, padding_free=wanted), display)
    assert prepared.padding_free is expected
    said = "padding: left out of the blocks of the model in training"
    assert (said in display.texts) is expected
    seen: list[Any] = []
    block = prepared.model.bert.encoder.layer[0].intermediate
    block.register_forward_hook(lambda _m, _i, output: seen.append(output.shape[0]))
    prepared.task.forward(prepared.model.train(), prepared.task.collate(prepared.train[:4]))
    assert seen == [1 if expected else 4]


def test_what_does_not_go_with_it_is_said(config: TrainConfig) -> None:
    settings = {"gradient_checkpointing": True}
    display: Any = Notes()
    reason = "trainer.gradient_checkpointing runs its blocks a second time"
    auto = changed(config, padding_free="auto", **settings)
    assert not choose_padding(auto, None, Any, (), display)  # type: ignore[arg-type]
    assert display.texts == [f"padding: computed along, since {reason}"]
    wanted = changed(config, padding_free=True, **settings)
    with pytest.raises(UserError) as caught:
        choose_padding(wanted, None, Any, (), display)  # type: ignore[arg-type]
    (problem,) = caught.value.problems
    assert problem.id == "trainer.no-padding-free"
    assert problem.message.endswith(f"is true: {reason}.")
    spread = replace(auto, distributed=replace(auto.distributed, shard_base=True))
    spread = changed(spread, gradient_checkpointing=False)
    assert not choose_padding(spread, None, Any, (), display)  # type: ignore[arg-type]
    assert display.texts[-1].endswith("its blocks are spread over the processes")


def test_where_accelerate_spreads_the_base(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_cli.commands.padding.sharding_of_accelerate", Sharding)
    display: Any = Notes()
    assert not choose_padding(config, None, Any, (), display)  # type: ignore[arg-type]
    assert display.texts == [
        "padding: computed along, since its blocks are spread over the processes"
    ]


def test_nothing_is_written_where_it_must_be_and_cannot(
    tiny_run: Any, run_cli: Callable[..., Any]
) -> None:
    finished = run_cli(
        "train",
        *(one for one in tiny_run.settings if not one.startswith("lora.")),
        "strategy=prefix",
        "trainer.padding_free=true",
        "run.name=none",
        cwd=tiny_run.cwd,
    )
    assert finished.code == 2
    assert "error[trainer.no-padding-free]" in finished.err
    assert "the prefix of a row is in the cache of its attention" in finished.err
    assert not (tiny_run.cwd / "runs" / "none").exists()
