"""Methods that act on each optimizer step, in the loop: AdaLoRA is the one there is."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from lora_cli.config.optim import AdamWConfig, SgdConfig
from lora_cli.lora.adalora import AdaLoraLinear
from lora_cli.lora.settings import AdaLoraSettings, LoraSettings
from lora_cli.lora.state import load_adapter_state
from lora_cli.training.events import CheckpointDue, Event, TrainState
from lora_cli.training.order import step_rows

_spec = importlib.util.spec_from_file_location(
    "loop_methods_support", Path(__file__).with_name("support.py")
)
assert _spec is not None
assert _spec.loader is not None
support = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(support)
build_trainer = support.build_trainer

ModelDir = Callable[..., Path]
PLAN = AdaLoraSettings(
    init_r=4, total_steps=16, warmup_steps=2, final_steps=5, every=2, orthogonal=3.0
)
ADALORA = LoraSettings(r=2, alpha=8.0, variant="adalora", adalora=PLAN)


@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_a_step_equals_mean_loss_plus_penalty(
    tiny_model_dir: ModelDir, toy_reviews: Path, micro: int | None, max_norm: float | None
) -> None:
    settings = {"model_dropout": False, "lora": ADALORA, "max_grad_norm": max_norm}
    ours = build_trainer(tiny_model_dir(), toy_reviews, micro_batch_size=micro, **settings)
    theirs = build_trainer(tiny_model_dir(), toy_reviews, **settings)
    _, indices = step_rows(64, seed=7, global_batch_size=8, step=0)
    batch = theirs.task.collate([theirs.plan.train[index] for index in indices])
    loss = functional.cross_entropy(theirs._plain_model(**batch["inputs"]).logits, batch["labels"])
    norms = []
    for layer in theirs._plain_model.modules():
        if isinstance(layer, AdaLoraLinear):
            eye = torch.eye(4)
            norms += [(layer.lora_A @ layer.lora_A.T - eye).norm()]
            norms += [(layer.lora_B.T @ layer.lora_B - eye).norm()]
    (loss + 3.0 * sum(norms) / len(norms)).backward()
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(theirs.parameters.values(), max_norm)

    count = ours._backward([ours.plan.train[index] for index in indices])[1]
    ours._scale_gradients(count)
    for name, parameter in ours.parameters.items():
        torch.testing.assert_close(
            parameter.grad, theirs.parameters[name].grad, rtol=1e-4, atol=1e-6
        )


def test_a_resumed_run_is_bit_equal(tiny_model_dir: ModelDir, toy_reviews: Path) -> None:
    states: dict[int, TrainState] = {}

    def keep(event: Event) -> None:
        if isinstance(event, CheckpointDue):
            states[event.state.progress.step] = event.state

    settings: dict[str, Any] = {"dropout": 0.1, "save_steps": 1, "lora": ADALORA}
    whole = build_trainer(tiny_model_dir(), toy_reviews, listeners=[keep], **settings)
    whole.run()
    expected = whole.adapter()
    # While nothing is taken away yet, while ranks fall, and after they are settled.
    assert [len(states[step].method) for step in (1, 7, 13)] == [24, 24, 4]
    for step in (1, 7, 13):
        resumed = build_trainer(tiny_model_dir(), toy_reviews, **settings)
        load_adapter_state(resumed._plain_model, states[step].adapter, resumed._saved_modules)
        resumed.resume(states[step])
        resumed.run()
        found = resumed.adapter()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    # Without what the method keeps, it goes another way.
    forgetful = build_trainer(tiny_model_dir(), toy_reviews, **settings)
    load_adapter_state(forgetful._plain_model, states[13].adapter, ("classifier",))
    forgetful.resume(replace(states[13], method={}))
    forgetful.run()
    other = forgetful.adapter()
    assert not all(torch.equal(other[name], expected[name]) for name in expected)


def test_ranks_end_where_they_should(tiny_model_dir: ModelDir, toy_reviews: Path) -> None:
    trainer = build_trainer(tiny_model_dir(), toy_reviews, lora=ADALORA)
    trainer.run()
    alive = [t.count_nonzero().item() for n, t in trainer.adapter().items() if "lora_E" in n]
    assert len(alive) == 4
    assert sum(alive) == 2 * 4


def test_a_step_that_was_skipped_is_none(
    tiny_model_dir: ModelDir, toy_reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build_trainer(tiny_model_dir(), toy_reviews, lora=ADALORA)
    seen: list[int] = []
    skipped = iter([False, True, True] + [False] * 13)
    monkeypatch.setattr(trainer.runtime, "was_skipped", lambda _: next(skipped))
    monkeypatch.setattr(trainer._method, "after_step", seen.append)
    trainer.run()
    assert seen == [1, *range(4, 17)]


def test_lora_plus_moves_b_further(tiny_model_dir: ModelDir, toy_reviews: Path) -> None:
    """With plain gradient descent a step is the learning rate times the gradient."""
    moved = {}
    for ratio in (1.0, 16.0):
        config = SgdConfig(lr=1e-3, momentum=0.0, lora_plus_ratio=ratio)
        trainer = build_trainer(
            tiny_model_dir(), toy_reviews, optimizer=config, max_steps=1, model_dropout=False
        )
        before = trainer.adapter()
        trainer.run()
        moved[ratio] = {n: t - before[n] for n, t in trainer.adapter().items()}
    for name, step in moved[1.0].items():
        factor = 16.0 if "lora_B" in name else 1.0
        torch.testing.assert_close(moved[16.0][name], factor * step, rtol=1e-4, atol=1e-8)
    assert any("lora_B" in name and step.any() for name, step in moved[1.0].items())


def test_the_learning_rate_that_is_shown_is_the_usual_one(
    tiny_model_dir: ModelDir, toy_reviews: Path
) -> None:
    shown = []
    for ratio in (1.0, 8.0):
        events: list[Any] = []
        build_trainer(
            tiny_model_dir(),
            toy_reviews,
            listeners=[events.append],
            optimizer=AdamWConfig(lora_plus_ratio=ratio),
            max_steps=3,
        ).run()
        shown.append([event.lr for event in events if hasattr(event, "lr")])
    assert shown[0] == shown[1]
