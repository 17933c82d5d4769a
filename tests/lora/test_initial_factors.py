"""Factors of single weights against NumPy's decompositions."""

import numpy as np
import pytest
import torch
from torch import nn

from lora_cli.errors import UserError
from lora_cli.lora.initial import olora_factors, pissa_factors, start_adapters
from lora_cli.lora.inject import inject_lora
from lora_cli.lora.settings import LoraSettings


def test_pissa_is_the_best_approximation_of_its_rank() -> None:
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(11, 7))).float()
    A, B = pissa_factors(weight, r=3, scale=2.5, niter=None)
    U, S, Vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    best = (U[:, :3] * S[:3]) @ Vh[:3]
    np.testing.assert_allclose((2.5 * B @ A).numpy(), best, atol=1e-5)
    # Both factors carry half of each singular value.
    np.testing.assert_allclose((A @ A.T).numpy(), np.diag(S[:3] / 2.5), atol=1e-5)
    np.testing.assert_allclose((B.T @ B).numpy(), np.diag(S[:3] / 2.5), atol=1e-5)


def test_randomized_pissa_finds_a_spectrum_that_decays() -> None:
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.normal(size=(size, 20)))[0] for size in (60, 40))
    weight = (left * 2.0 ** -np.arange(20)) @ right.T
    torch.manual_seed(0)
    exact = pissa_factors(torch.from_numpy(weight), r=5, scale=2.0, niter=None)
    quick = pissa_factors(torch.from_numpy(weight), r=5, scale=2.0, niter=16)
    for (A, B), (A4, B4) in [(exact, quick)]:
        np.testing.assert_allclose((B4 @ A4).numpy(), (B @ A).numpy(), atol=1e-6)


def test_olora_is_the_first_columns_of_qr() -> None:
    weight = torch.from_numpy(np.random.default_rng(2).normal(size=(6, 9))).float()
    A, B = olora_factors(weight, r=4)
    np.testing.assert_allclose((B.T @ B).numpy(), np.eye(4), atol=1e-6)
    # The first columns of W are within the span, and are given exactly.
    np.testing.assert_allclose((B @ A)[:, :4].numpy(), weight[:, :4].numpy(), atol=1e-5)
    assert np.abs(np.tril(A.numpy(), -1)).max() == 0


def test_weights_that_are_not_finite_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data[0, 0] = torch.nan
    settings = LoraSettings(r=4, alpha=8.0, init="pissa")
    inject_lora(model, ["0", "1"], settings)
    with pytest.raises(UserError) as caught:
        start_adapters(model, settings)
    (problem,) = caught.value.problems
    assert problem.id == "lora.init-weight"
    assert '"1"' in problem.message
