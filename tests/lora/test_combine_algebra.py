"""Combining against algebra: NumPy, counting by hand, and what is refused."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_cli.errors import UserError
from lora_cli.lora.combine import METHODS, Blend, Method, combine_factors
from lora_cli.lora.factors import Factors

BY_ENTRY: tuple[Method, ...] = tuple(m for m in METHODS if m not in ("cat", "svd"))


def product(factors: Factors) -> torch.Tensor:
    """The update as (out, everything else), group by group."""
    g = factors.groups
    a = factors.A.double().reshape(g, factors.r // g, -1)
    b = factors.B.double().reshape(g, -1, factors.r // g)
    return factors.scale * (b @ a).reshape(factors.B.shape[0], -1)


def random_factors(
    generator: torch.Generator, r: int, *, out: int = 6, size: int = 5, scale: float = 1.0
) -> Factors:
    return Factors(
        A=torch.randn(r, size, generator=generator),
        B=torch.randn(out, r, generator=generator),
        scale=scale,
    )


@given(
    seed=st.integers(0, 2**16),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    r=st.integers(1, 8),
    out=st.integers(1, 9),
    size=st.integers(1, 9),
)
def test_svd_is_the_best_of_its_rank(
    seed: int, ranks: list[int], r: int, out: int, size: int
) -> None:
    """The error is the tail of NumPy's singular values of the weighted sum (Eckart-Young)."""
    generator = torch.Generator().manual_seed(seed)
    weights = [float(w) for w in torch.randn(len(ranks), generator=generator)]
    parts = [
        {"x": random_factors(generator, rank, out=out, size=size, scale=0.5 + rank)}
        for rank in ranks
    ]
    whole = sum(w * product(p["x"]).numpy() for w, p in zip(weights, parts, strict=True))
    found = combine_factors(parts, Blend(weights=weights, method="svd", r=r))["x"]
    values = np.linalg.svd(whole, compute_uv=False)
    error = np.linalg.norm(whole - product(found).numpy())
    assert error == pytest.approx(math.sqrt((values[r:] ** 2).sum()), abs=1e-4 * (1 + values[0]))
    assert found.r == min(r, sum(ranks), out, size)


def test_linear_of_one_adapter_scales_it() -> None:
    part = random_factors(torch.Generator().manual_seed(1), 3, scale=2.0)
    for weight in (0.25, -0.25):
        found = combine_factors([{"x": part}], Blend(weights=[weight]))["x"]
        torch.testing.assert_close(product(found), weight * product(part), rtol=1e-5, atol=1e-6)


def test_ties_by_hand() -> None:
    """Section 3 of the paper on four entries: trim, elect, mean of those that agree."""
    rows = [[4.0, -3.0, 1.0, 0.5], [-2.0, -5.0, 0.25, 0.75]]
    parts = [{"x": Factors(A=torch.tensor([row]), B=torch.ones(1, 1), scale=1.0)} for row in rows]
    found = combine_factors(parts, Blend(weights=[1, 1], method="ties", density=0.5))["x"]
    # Trimmed to [4, -3, 0, 0] and [-2, -5, 0, 0]: + wins at the first place, both count at the
    # second, and nothing is left at the others.
    assert found.A.tolist() == [[4.0, -4.0, 0.0, 0.0]]
    frequency = Blend(weights=[1, 1, 1], method="ties", density=1.0, majority_sign="frequency")
    third = {"x": Factors(A=torch.tensor([[-1.0, 1, 1, 1]]), B=torch.ones(1, 1), scale=1.0)}
    found = combine_factors([*parts, third], frequency)["x"]
    assert found.A.tolist() == [[-1.5, -4.0, 0.75, 0.75]]


def test_what_dare_keeps_is_rescaled_and_drawn_from_the_seed() -> None:
    part = {"x": Factors(A=torch.ones(50, 100), B=torch.ones(80, 50), scale=1.0)}

    def draw(seed: int) -> torch.Tensor:
        how = Blend(weights=[1.0], method="dare_linear", density=0.2, seed=seed)
        return combine_factors([part], how)["x"].A

    kept = draw(3)
    assert set(kept.unique().tolist()) == {0.0, 5.0}
    # 5,000 draws: the mean is within five standard deviations of 1.
    assert abs(float(kept.mean()) - 1) < 5 * 2 / math.sqrt(5000)
    assert torch.equal(kept, draw(3))
    assert not torch.equal(kept, draw(4))
    state = torch.get_rng_state()
    draw(3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_a_grouped_convolution_keeps_its_groups(method: Method) -> None:
    """Both convolutions in a row, as the layer calls them, give the sum of the parts."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        Factors(
            A=torch.randn(r, 4, 3, generator=generator),
            B=torch.randn(6, r // 2, 1, generator=generator),
            scale=scale,
        )
        for r, scale in ((2, 0.5), (4, 2.0))
    ]
    how = Blend(weights=[0.7, -0.3], method=method, r=6 if method == "svd" else None)
    found = combine_factors([{"x": part} for part in parts], how)["x"]
    assert (found.A.shape, found.B.shape) == ((6, 4, 3), (6, 3, 1))
    x = torch.randn(2, 4, 9, generator=generator)

    def call(f: Factors) -> torch.Tensor:
        hidden = nn.functional.conv1d(x, f.A)
        return f.scale * nn.functional.conv1d(hidden, f.B, groups=2)

    expected = 0.7 * call(parts[0]) - 0.3 * call(parts[1])
    torch.testing.assert_close(call(found), expected, rtol=1e-4, atol=1e-5)
    small = combine_factors([{"x": p} for p in parts], Blend(weights=[1, 1], method="svd", r=2))
    assert (small["x"].A.shape, small["x"].B.shape) == ((2, 4, 3), (6, 1, 1))
    whole = (product(parts[0]) + product(parts[1])).reshape(2, 3, 12).numpy()
    kept = product(small["x"]).reshape(2, 3, 12).numpy()
    for group in range(2):
        values = np.linalg.svd(whole[group], compute_uv=False)
        error = np.linalg.norm(whole[group] - kept[group])
        assert error == pytest.approx(math.sqrt((values[1:] ** 2).sum()), rel=1e-4)
    odd = Blend(weights=[1, 1], method="svd", r=3)
    with pytest.raises(UserError, match="multiple of the groups"):
        combine_factors([{"x": part} for part in parts], odd)


def test_nothing_that_is_given_is_changed() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [{"x": random_factors(generator, 3)} for _ in range(2)]
    before = copy.deepcopy(parts)
    for method in METHODS:
        found = combine_factors(parts, Blend(weights=[0.5, 2.0], method=method, density=1.0))
        found["x"].A.zero_()
        found["x"].B.zero_()
        for part, kept in zip(parts, before, strict=True):
            assert torch.equal(part["x"].A, kept["x"].A)
            assert torch.equal(part["x"].B, kept["x"].B)
        assert found["x"].A.is_contiguous()
        assert found["x"].B.is_contiguous()
        assert found["x"].A.dtype == torch.float32


@pytest.mark.parametrize("method", BY_ENTRY)
def test_other_ranks_are_refused_where_entries_meet(method: Method) -> None:
    generator = torch.Generator().manual_seed(0)
    first = {name: random_factors(generator, 3) for name in ("x", "y", "z")}
    second = {"x": random_factors(generator, 3), "y": random_factors(generator, 2)}
    with pytest.raises(UserError) as caught:
        combine_factors([first, second], Blend(weights=[1, 1], method=method))
    (problem,) = caught.value.problems
    assert problem.id == "merge.cannot-combine"
    assert problem.message.endswith(f"is {method}, and they differ in: y (3, 2).")
    assert (problem.key, problem.allowed) == ("method", "cat, svd")


@pytest.mark.parametrize("method", METHODS)
def test_other_shapes_are_refused(method: Method) -> None:
    generator = torch.Generator().manual_seed(0)
    first = {name: random_factors(generator, 3) for name in ("x", "y", "z")}
    second = {
        "x": random_factors(generator, 3),
        "y": random_factors(generator, 3, out=7),
        "z": random_factors(generator, 3, size=2),
    }
    with pytest.raises(UserError, match=r"their shapes differ in: y, z\."):
        combine_factors([first, second], Blend(weights=[1, 1], method=method))


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": [1.0]},
        {"weights": [1.0, math.nan]},
        {"weights": [1.0, math.inf]},
        {"weights": [1.0, 1.0], "density": 0.0},
        {"weights": [1.0, 1.0], "density": 1.1},
        {"weights": [1.0, 1.0], "r": 0},
    ],
)
def test_settings_outside_their_range(settings: dict[str, Any]) -> None:
    part = {"x": random_factors(torch.Generator().manual_seed(0), 3)}
    with pytest.raises(ValueError, match="must be"):
        combine_factors([part, part], Blend(**settings))


@pytest.mark.parametrize("method", METHODS)
def test_weights_beyond_float32(method: Method) -> None:
    generator = torch.Generator().manual_seed(0)
    part = {"x": random_factors(generator, 3), "y": random_factors(generator, 3)}
    with pytest.raises(UserError, match=r"range of float32, but do not in: x, y\."):
        combine_factors([part], Blend(weights=[1e300], method=method, density=1.0))
