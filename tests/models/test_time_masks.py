"""Masks over time: drawn by the seed of the step, not at all where a sound is too short."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_sounds import WAVES, build

from lora_cli.models.time_masks import seeded_masks


def run(model: Any, seed: int | None, ids: list[str], samples: int = 8000) -> torch.Tensor:
    torch.manual_seed(0)
    values = torch.randn(len(ids), samples)
    with torch.no_grad(), seeded_masks(model, seed=seed, ids=ids, samples=samples):
        found: torch.Tensor = model(input_values=values).logits
    return found


pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")


@pytest.fixture(params=WAVES)
def model(request: pytest.FixtureRequest) -> Any:
    found = build(request.param)
    found.config.mask_time_prob, found.config.mask_time_min_masks = 0.3, 2
    for layer in found.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    return found


def test_masks_follow_from_step_and_rows(model: Any) -> None:
    plain = run(model, 1, ["a", "b"])
    model.train()
    state = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    first = run(model, 1, ["a", "b"])
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index, union-attr]
    assert not torch.allclose(first, plain)
    np.random.random(10)
    assert torch.equal(first, run(model, 1, ["a", "b"]))
    assert not torch.allclose(first, run(model, 2, ["a", "b"]))
    assert not torch.allclose(first, run(model, 1, ["a", "c"]))


def test_short_sounds_are_not_masked(model: Any) -> None:
    plain = run(model, None, ["a"], 1000)
    model.train()
    with pytest.raises(ValueError, match="mask_length"):
        run(model, None, ["a"], 1000)
    assert torch.allclose(run(model, 1, ["a"], 1000), plain, atol=1e-6)
    assert model.config.apply_spec_augment


def test_models_without_masks_are_left_alone() -> None:
    with seeded_masks(object(), seed=1, ids=["a"], samples=100):
        pass
