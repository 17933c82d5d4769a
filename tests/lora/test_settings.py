import dataclasses

import pytest

from lora_cli.lora.settings import LoraSettings, scale_of


@pytest.mark.parametrize(
    ("r", "alpha", "rslora", "scale"),
    [(4, 8.0, False, 2.0), (4, 8.0, True, 4.0), (16, 1.0, True, 0.25), (1, 3.5, False, 3.5)],
)
def test_scale(r: int, alpha: float, rslora: bool, scale: float) -> None:
    assert scale_of(r, alpha, rslora=rslora) == scale


def test_the_first_pattern_that_matches_counts() -> None:
    settings = LoraSettings(
        r=8,
        alpha=16.0,
        rank_pattern={"attention.query": 2, "query": 3, "*.layer.1.*": 5},
        alpha_pattern={"*.value": 1.0},
    )
    ranks = {
        "encoder.layer.0.attention.query": 2,
        "encoder.layer.1.attention.query": 2,
        "encoder.layer.1.other.query": 3,
        "encoder.layer.1.attention.key": 5,
        "encoder.layer.0.attention.key": 8,
        "encoder.layer.0.attention.xquery": 8,
    }
    assert {name: settings.r_of(name) for name in ranks} == ranks
    assert settings.alpha_of("a.value") == 1.0
    assert settings.alpha_of("a.key") == 16.0


def test_settings_are_frozen_and_start_plain() -> None:
    settings = LoraSettings(r=8, alpha=16.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.r = 4  # type: ignore[misc]
    assert (settings.variant, settings.init, settings.bias) == ("lora", "kaiming", "none")
    assert settings.rank_pattern == {}
    assert LoraSettings(r=1, alpha=1.0).rank_pattern is not settings.rank_pattern
