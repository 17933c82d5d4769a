"""Updates in other ranks, against numpy's singular values of the whole matrix."""

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d

from lora_cli.lora.factors import Factors
from lora_cli.lora.resizing import resize_factors


def factors(*, r: int = 5, b: int = 7, a: tuple[int, ...] = (9,)) -> Factors:
    generator = torch.Generator().manual_seed(0)
    kernel = (1,) * (len(a) - 1)
    return Factors(
        A=torch.randn(r, *a, generator=generator),
        B=torch.randn(b, r, *kernel, generator=generator),
        scale=0.3,
    )


def product(found: Factors) -> torch.Tensor:
    return found.B.flatten(1) @ found.A.flatten(1)


@pytest.mark.parametrize("r", [5, 6, 20])
def test_more_rank_is_the_same_update(r: int) -> None:
    old = factors()
    new = resize_factors(old, r)
    assert (new.factors.r, new.factors.scale, new.energy) == (r, 0.3, 1.0)
    torch.testing.assert_close(product(new.factors), product(old))
    assert new.whole == pytest.approx(float(product(old).square().sum()), rel=1e-5)


@pytest.mark.parametrize("a", [(9,), (2, 3, 3)])
def test_less_rank_is_the_closest(a: tuple[int, ...]) -> None:
    old = factors(a=a)
    new = resize_factors(old, 2)
    u, s, vt = np.linalg.svd(product(old).double().numpy())
    assert new.factors.A.shape == (2, *a)
    np.testing.assert_allclose(product(new.factors), (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5)
    assert new.energy == pytest.approx(float((s[:2] ** 2).sum() / (s**2).sum()), rel=1e-6)


def test_a_convolution_computes_the_same_with_more_rank() -> None:
    old = factors(a=(2, 3, 3))
    new = resize_factors(old, 8).factors
    x = torch.randn(1, 2, 6, 6)
    expected = conv2d(conv2d(x, old.A), old.B)
    torch.testing.assert_close(conv2d(conv2d(x, new.A), new.B), expected)


def test_a_layer_smaller_than_the_rank_is_filled_up_with_zeros() -> None:
    old = factors(b=3, r=8)
    new = resize_factors(old, 6)
    assert new.factors.r == 6
    assert new.energy == pytest.approx(1.0)
    torch.testing.assert_close(product(new.factors), product(old))


def test_nothing_stays_nothing_and_groups_are_refused() -> None:
    old = factors()
    zero = Factors(A=old.A, B=torch.zeros_like(old.B), scale=1.0)
    assert resize_factors(zero, 2).energy == 1.0
    grouped = Factors(A=torch.ones(4, 6, 1), B=torch.ones(8, 2, 1), scale=1.0)
    assert resize_factors(grouped, 4).factors is grouped
    with pytest.raises(ValueError, match="in groups"):
        resize_factors(grouped, 2)
