"""Slices of the loss, against the cross-entropy of torch over all logits at once."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from lora_cli.tasks import token_loss
from lora_cli.tasks.token_loss import cut_rows, own_and_best, sliced_loss

V, H, N = 13, 6, 10


@pytest.fixture(autouse=True)
def three_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "_NUMBERS_AT_ONCE", 3 * V)


def draw(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype)
    true = torch.randint(V, (N,), generator=generator)
    head = nn.Linear(H, V, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, H, generator=generator))
    return rows.requires_grad_(), true, head


class Other(nn.Linear):
    """A frozen head that uses a trained weight of another layer, as a tied one may."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(H, V)
        self.load_state_dict(head.state_dict())
        self.elsewhere = [nn.Parameter(torch.full((V,), 0.5))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.elsewhere[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["frozen", "trained", "other"])
def test_loss_and_gradients_are_those_of_all_logits(kind: str, smoothing: float) -> None:
    rows, true, head = draw(torch.float32)
    head = Other(head) if kind == "other" else head
    head.requires_grad_(kind == "trained")
    wanted = [rows, *(p for p in head.parameters() if p.requires_grad)]
    wanted += head.elsewhere if isinstance(head, Other) else []
    whole = functional.cross_entropy(head(rows), true, reduction="sum", label_smoothing=smoothing)
    expected = torch.autograd.grad(3.0 * whole, wanted)
    loss = sliced_loss(rows, true, head, width=V, label_smoothing=smoothing)
    found = torch.autograd.grad(3.0 * loss, wanted)
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=1e-6)
    for one, other_one in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other_one, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_gradcheck(kind: str) -> None:
    rows, true, head = draw(torch.float64)
    head.requires_grad_(kind == "trained")

    def loss(rows: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return sliced_loss(rows, true, head, width=V, label_smoothing=0.1)

    wanted = (rows, *(p for p in head.parameters() if p.requires_grad))
    assert torch.autograd.gradcheck(loss, wanted)


def test_no_tensor_has_the_scores_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, true, head = draw(torch.float32)
    seen, plain = [], functional.cross_entropy

    def watched(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(len(logits))
        return plain(logits, *args, **kwargs)

    monkeypatch.setattr(functional, "cross_entropy", watched)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        loss = sliced_loss(rows, true, head.requires_grad_(False), width=V)
    assert seen == [3, 3, 3, 1]
    # Going back needs the gradient alone.
    assert kept.count(torch.Size([N, H])) >= 1
    assert not any(shape == (N, V) for shape in kept)
    loss.backward()
    assert seen == [3, 3, 3, 1]


def test_half_precision_is_summed_in_float32() -> None:
    rows, true, head = draw(torch.bfloat16)
    loss = sliced_loss(rows, true, head.requires_grad_(False), width=V)
    loss.backward()
    assert loss.dtype == torch.float32
    assert rows.grad is not None
    assert rows.grad.dtype == torch.bfloat16
    logits = head(rows.detach()).float()
    expected = functional.cross_entropy(logits, true, reduction="sum")
    torch.testing.assert_close(loss.detach(), expected)


def test_fp16_keeps_the_scale_of_the_loss() -> None:
    """A small gradient is lost in fp16 unless the loss was scaled before it was computed."""
    rows, true, head = draw(torch.float16)
    with torch.no_grad():
        head.weight.mul_(1e-4)
        head.bias.zero_()
    (2.0**16 * sliced_loss(rows, true, head.requires_grad_(False), width=V)).backward()
    exact = rows.detach().double().requires_grad_()
    scores = functional.linear(exact, head.weight.double())
    functional.cross_entropy(scores, true, reduction="sum").backward()
    assert rows.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(rows.grad.double() / 2**16, exact.grad, rtol=1e-2, atol=1e-8)


def test_no_rows() -> None:
    rows, true, head = draw(torch.float32)
    for is_trained in (False, True):
        head.requires_grad_(is_trained)
        loss = sliced_loss(rows[:0], true[:0], head, width=V)
        loss.backward()
        assert float(loss.detach()) == 0.0


def test_slices_hold_every_row_once() -> None:
    rows = torch.arange(N)
    assert torch.equal(torch.cat([rows[part] for part in cut_rows(rows, V)]), rows)
    assert cut_rows(rows[:0], V) == []
    assert cut_rows(rows, 10**9) == [slice(n, n + 1) for n in range(N)]


def test_own_and_best() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 0.0]])
    found = own_and_best(logits, torch.tensor([2, 1]))
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(found, torch.stack([expected[0, [2, 1]], expected[1, [1, 0]]]))
