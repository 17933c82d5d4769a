"""Updates of an adapter by layer, and settings that give them back."""

import pytest
import torch

from lora_cli.artifacts.peft_format import PeftAdapter
from lora_cli.artifacts.peft_layers import adapter_layers, settings_of, with_layers
from lora_cli.errors import UserError
from lora_cli.lora.factors import Factors, factor_state
from lora_cli.lora.settings import LoraSettings, scale_of


def factors(r: int, scale: float, *, is_embedding: bool = False) -> Factors:
    return Factors(A=torch.ones(r, 3), B=torch.ones(5, r), scale=scale, is_embedding=is_embedding)


LAYERS = {
    "a.q": factors(3, 0.1),
    "b.q": factors(3, 0.1),
    "c.q": factors(4, 0.7),
    "table": factors(3, 1.0, is_embedding=True),
}


def adapter(settings: LoraSettings, layers: dict[str, Factors]) -> PeftAdapter:
    return PeftAdapter(
        settings=settings,
        targets=(),
        saved_modules=("head",),
        task_type=None,
        base_name=None,
        revision=None,
        state={**factor_state(layers), "head.weight": torch.ones(2)},
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_settings_give_each_layer_its_rank_and_scale(rslora: bool) -> None:
    settings = settings_of(LAYERS, LoraSettings(r=1, alpha=1.0, rslora=rslora, dropout=0.1))
    assert (settings.r, settings.dropout, settings.rank_pattern) == (3, 0.1, {"c.q": 4})
    for name, layer in LAYERS.items():
        scale = scale_of(settings.r_of(name), settings.alpha_of(name), rslora=rslora)
        assert scale == pytest.approx(layer.scale, rel=1e-11)
    found = adapter_layers(adapter(settings, LAYERS), where="")
    assert {name: layer.is_embedding for name, layer in found.items()} == {
        name: layer.is_embedding for name, layer in LAYERS.items()
    }


def test_other_tensors_stay_and_halves_are_named() -> None:
    before = adapter(settings_of(LAYERS, LoraSettings(r=1, alpha=1.0)), LAYERS)
    after = with_layers(before, {name: factors(2, 1.0) for name in ("a.q", "b.q", "c.q")})
    assert after.state["head.weight"] is before.state["head.weight"]
    assert after.state["a.q.lora_A.weight"].shape == (2, 3)
    assert (after.settings.r, after.settings.alpha) == (2, 2.0)
    state = {name: t for name, t in before.state.items() if name != "a.q.lora_B.weight"}
    halved = PeftAdapter(
        settings=before.settings,
        targets=(),
        saved_modules=(),
        task_type=None,
        base_name=None,
        revision=None,
        state=state,
    )
    with pytest.raises(UserError, match=r"lacks a\.q\.lora_B\.weight"):
        adapter_layers(halved, where="")
