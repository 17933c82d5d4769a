"""The spectrum of inputs, batch by batch, against NumPy's decomposition of all at once."""

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.lora.eva import InputSpectrum, spread_ranks


def principal(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the variance and right singular vectors, by NumPy."""
    _, values, rows = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    return values**2 / (values**2).sum(), rows


def smallest_cosine(first: Any, second: Any) -> float:
    """Cosine of the largest principal angle between the row spaces of two matrices."""
    bases = [np.linalg.qr(np.asarray(rows, dtype=np.float64).T)[0] for rows in (first, second)]
    return float(np.linalg.svd(bases[0].T @ bases[1])[1].min())


@settings(max_examples=30)
@given(
    columns=st.integers(1, 12),
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
)
def test_batches_give_what_one_svd_of_all_gives(columns: int, sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(columns, columns)) * 2.0 ** -np.arange(columns)
    # Means that move, as those of different batches do.
    parts = [rng.normal(size=(n, columns)) @ mixing.T + rng.normal(size=columns) for n in sizes]
    spectrum = InputSpectrum(keep=columns)
    for part in parts:
        spectrum.add(torch.from_numpy(part))
    everything = np.concatenate(parts)
    if len(everything) < 2:
        assert spectrum.shares == []
        return
    shares, rows = principal(everything)
    real = int((shares > 1e-5).sum())
    np.testing.assert_allclose(spectrum.shares[:real], shares[:real], rtol=1e-3, atol=1e-6)
    found = spectrum.directions(real).double().numpy()
    np.testing.assert_allclose(found @ found.T, np.eye(real), atol=1e-5)
    gaps = np.abs(np.diff(shares, append=0.0))[:real]
    for index in range(real):
        if min(gaps[max(index - 1, 0) : index + 1]) > 1e-2:
            assert abs(found[index] @ rows[index]) > 1 - 1e-4
            assert found[index][np.abs(found[index]).argmax()] > 0


def test_directions_that_are_rounding_are_none() -> None:
    rng = np.random.default_rng(0)
    spectrum = InputSpectrum(keep=8)
    for _ in range(3):
        x = rng.normal(size=(20, 2)) @ np.eye(2, 8) + 5.0
        spectrum.add(torch.from_numpy(x))
    assert len(spectrum.shares) == 2
    constant = InputSpectrum(keep=8)
    constant.add(torch.ones(9, 8))
    assert constant.shares == []


def test_few_directions_are_kept_without_losing_the_large_ones() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(60, 30)))[0]
    x = (rng.normal(size=(800, 30)) * 1.5 ** -np.arange(30)) @ basis.T + 3.0
    spectrum = InputSpectrum(keep=16)
    for part in np.array_split(x, 4):
        spectrum.add(torch.from_numpy(part))
    shares, rows = principal(x)
    np.testing.assert_allclose(spectrum.shares[:4], shares[:4], rtol=1e-3)
    assert smallest_cosine(spectrum.directions(4), rows[:4]) > 0.9999


def test_ranks_go_where_the_variance_is() -> None:
    shares = {"a": [0.5, 0.3, 0.1, 0.05], "b": [0.9, 0.04, 0.03], "c": [0.6, 0.2, 0.15]}
    ranks = dict.fromkeys(shares, 2)
    assert spread_ranks(shares, ranks, rho=2.0) == {"a": 2, "b": 1, "c": 3}
    assert spread_ranks(shares, ranks, rho=1.0) == ranks
    assert spread_ranks({"a": [0.5], "b": [0.4], "c": []}, {"a": 1, "b": 1, "c": 0}, rho=2.0) == {
        "a": 1,
        "b": 1,
        "c": 0,
    }
    # Of equal shares, the first layer has the better claim.
    assert spread_ranks({"x": [0.5, 0.5], "y": [0.5, 0.5]}, {"x": 1, "y": 2}, rho=2.0) == {
        "x": 2,
        "y": 1,
    }
