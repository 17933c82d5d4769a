"""The best update of a rank, against plain algebra."""

import pytest
import torch

from lora_cli.lora import extraction
from lora_cli.lora.extraction import extract_update


def _pair(rank: int, *, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    before = torch.randn(40, 24, generator=draw)
    update = torch.randn(40, rank, generator=draw) @ torch.randn(rank, 24, generator=draw)
    return before, before + update + noise * torch.randn(40, 24, generator=draw)


def test_an_update_of_that_rank_comes_back_whole() -> None:
    before, after = _pair(3)
    found = extract_update(before, after, 3)
    torch.testing.assert_close(before + found.B @ found.A, after, rtol=1e-4, atol=1e-4)
    assert found.kept / found.whole == pytest.approx(1.0, abs=1e-5)


def test_energy_is_what_is_left_of_the_squared_length() -> None:
    before, after = _pair(6, noise=0.5)
    for r in (1, 4, 10):
        found = extract_update(before, after, r)
        rest = (after - before - found.B @ found.A).double().square().sum()
        assert found.whole - found.kept == pytest.approx(float(rest), rel=1e-4)


def test_no_other_update_of_that_rank_is_closer() -> None:
    before, after = _pair(6, noise=0.5)
    found = extract_update(before, after, 4)
    closest = (after - before - found.B @ found.A).norm()
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        a = found.A + 0.05 * torch.randn(found.A.shape, generator=draw)
        b = found.B + 0.05 * torch.randn(found.B.shape, generator=draw)
        assert (after - before - b @ a).norm() > closest


def test_a_small_layer_has_all_of_it() -> None:
    found = extract_update(torch.zeros(3, 5), torch.ones(3, 5), 16)
    assert (found.A.shape, found.B.shape) == ((3, 5), (3, 3))


def test_a_large_layer_is_decomposed_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = _pair(6, noise=0.01)
    exact = extract_update(before, after, 6)
    monkeypatch.setattr(extraction, "_EXACT_SIZE", 8)
    state = torch.random.get_rng_state()
    part = extract_update(before, after, 6)
    torch.testing.assert_close(part.B @ part.A, exact.B @ exact.A, rtol=1e-3, atol=1e-3)
    assert torch.equal(state, torch.random.get_rng_state())
