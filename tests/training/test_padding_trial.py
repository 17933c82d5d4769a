"""The trial that decides whether a model trains without padding."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lora_cli.config.language import CausalLanguageModelingConfig
from lora_cli.data.types import Row
from lora_cli.tasks.causal_language_modeling import CausalLanguageModelingTask
from lora_cli.training import padding_trial
from lora_cli.training.padding_trial import leave_out_padding

_spec = importlib.util.spec_from_file_location(
    "trial_support", Path(__file__).with_name("support.py")
)
assert _spec is not None
assert _spec.loader is not None
support = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(support)


@pytest.fixture
def made(tiny_model_dir: Any, toy_reviews: Path) -> Any:
    task, base, rows = support.build_task(tiny_model_dir(), toy_reviews)
    return base.model, task, rows["train"]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_a_model_that_says_the_same_goes_without(made: Any) -> None:
    model, task, rows = made
    model.train()
    before = torch.get_rng_state()
    assert leave_out_padding(model, task, rows) is None
    assert hooks(model) > 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_language_model_goes_without(tiny_language_dir: Callable[..., Path]) -> None:
    """Its task looks at the model when it meets it."""
    folder = tiny_language_dir("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = CausalLanguageModelingConfig(max_length=32)
    task = CausalLanguageModelingTask(config, {"columns": {"text": "text"}}, tokenizer)
    texts = ("a film", "a warm and funny film that is too long", "not a good film")
    rows = [
        task.encode(Row(str(n), {"text": text}, "here", n)) for n, text in enumerate(texts, start=1)
    ]
    assert leave_out_padding(model, task, rows) is None
    assert hooks(model) > 0


class Looking(nn.Module):
    """A block that adds the first number that it is given, which is that of another row's token."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = self.block(hidden_states, *args, **kwargs)
        return found + 1e-2 * hidden_states[:, :1]


class Shaped(Looking):
    """A block that must be given the batch as it is."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.block(hidden_states.view(2, -1, 32), *args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Looking, "BertForSequenceClassification says something else then"),
        (Shaped, "BertForSequenceClassification is not made for it (RuntimeError)"),
    ],
)
def test_a_model_that_does_not_keeps_its_padding(made: Any, kind: Any, reason: str) -> None:
    model, task, rows = made
    layers = model.bert.encoder.layer
    layers[1] = kind(layers[1])
    odd = [row for row in rows if row["length"] % 2 == 1]
    assert leave_out_padding(model, task, odd) == reason
    assert hooks(model) == 0


def test_a_loss_that_differs_is_seen(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task, rows = made
    plain = model.classifier.forward
    calls: list[int] = []

    def drifting(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        found: torch.Tensor = plain(x)
        return found + len(calls) * torch.tensor([0.0, 0.1])

    monkeypatch.setattr(model.classifier, "forward", drifting)
    reason = leave_out_padding(model, task, rows)
    assert reason == "BertForSequenceClassification says something else then"
    assert len(calls) == 3


def test_rows_of_one_length_have_none(made: Any) -> None:
    model, task, rows = made
    assert leave_out_padding(model, task, rows[:1] * 3) == ""
    assert leave_out_padding(model, task, []) == ""
    assert hooks(model) == 0


def test_few_rows_are_looked_at(made: Any) -> None:
    """All of them may not fit into memory."""
    model, task, rows = made
    ranked = sorted(rows, key=lambda row: int(row["length"]))
    short, long = ranked[0], ranked[-1]
    assert short["length"] < long["length"]
    rows_asked_for = 0

    class Lazy(list[Any]):
        def __iter__(self) -> Any:
            nonlocal rows_asked_for
            for row in super().__iter__():
                rows_asked_for += 1
                yield row

    assert leave_out_padding(model, task, Lazy([short, *[long] * 100_000])) is None
    assert rows_asked_for == 256
    later = Lazy([*[short] * 300, long, *[short] * 100_000])
    assert padding_trial._two_lengths(later) == (short, long)
    assert rows_asked_for == 256 + 256 + 301


def test_a_batch_without_a_mask_has_none_that_is_known(made: Any) -> None:
    model, task, rows = made

    class Maskless:
        collate = task.collate

        def forward(self, model: Any, batch: Any) -> Any:
            inputs = {k: v for k, v in batch["inputs"].items() if k != "attention_mask"}
            return task.forward(model, {**batch, "inputs": inputs})

    found: Any = Maskless()
    assert leave_out_padding(model, found, rows) == ""
    assert hooks(model) == 0


def test_too_little_memory_is_no_reason(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task, rows = made

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(model.classifier, "forward", fail)
    with pytest.raises(RuntimeError, match="not enough memory"):
        leave_out_padding(model, task, rows)
