"""What merging does to the rows of a tensor, against plain algebra, in parts of any size."""

import pytest
import torch

from lora_cli.lora.updates import Change, LowRank, Replaced, Rescaled, SomeRows, Stack


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


A, B, W = draw(2, 6), draw(8, 2), draw(8, 6)
V = W + 0.5 * B @ A
M = draw(8).abs() + 0.1
STACKED = [(draw(2, 6) + n, draw(8, 2) - n) for n in range(3)]
CASES: dict[str, tuple[Change, torch.Tensor, torch.Tensor]] = {
    "low rank": (LowRank(A, B, 0.5), W, V),
    "transposed": (LowRank(A, B, 0.5, transposed=True), W.T.contiguous(), V.T.contiguous()),
    "dora": (Rescaled(A, B, 0.5, M), W, M[:, None] * V / V.norm(dim=1, keepdim=True)),
    "replaced": (Replaced(V), W, V),
    "some rows": (
        SomeRows({1: A[0], 7: A[1]}),
        W,
        torch.stack([*W[:1], A[0], *W[2:7], A[1]]),
    ),
    "stack": (
        Stack([LowRank(a, b, 0.5) for a, b in STACKED], 8),
        W.expand(3, 8, 6).flatten(1).contiguous(),
        torch.stack([W + 0.5 * b @ a for a, b in STACKED]).flatten(1),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("step", [1, 3, 100])
def test_rows_in_parts(name: str, step: int) -> None:
    change, old, expected = CASES[name]
    parts = [
        change.rows(old[start : start + step], start, min(start + step, len(old)))
        for start in range(0, len(old), step)
    ]
    assert torch.allclose(torch.cat(parts), expected, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_moves_are_those_of_the_new_rows(name: str) -> None:
    change, old, expected = CASES[name]
    x = draw(old.shape[1], 4).double()
    move = change.moves(x)
    found = torch.cat([move(old[:2], 0, 2), move(old[2:], 2, len(old))])
    assert torch.allclose(found, (expected.double() - old.double()) @ x, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_by_the_caller_alone(dtype: torch.dtype) -> None:
    old = W.to(dtype)
    new = LowRank(A, B, 0.5).rows(old, 0, 8)
    assert new.dtype == torch.float32
    assert torch.equal(new, old.float() + (B @ A) * 0.5)


def test_doubles_stay_doubles() -> None:
    assert torch.equal(LowRank(A, B, 0.5).rows(W.double(), 0, 8), W.double() + (B @ A) * 0.5)


def test_a_row_of_zeros_stays_one() -> None:
    zero = Rescaled(torch.zeros(2, 6), B, 1.0, M).rows(torch.zeros(8, 6), 0, 8)
    assert torch.equal(zero, torch.zeros(8, 6))
