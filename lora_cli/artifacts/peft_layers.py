"""The updates of an adapter by layer, and the same adapter with others in their place."""

from collections.abc import Mapping
from dataclasses import replace
from statistics import mode

from lora_cli.artifacts.peft_format import PeftAdapter
from lora_cli.errors import Problem, UserError
from lora_cli.lora.factors import Factors, factor_state, few
from lora_cli.lora.patterns import outermost
from lora_cli.lora.settings import LoraSettings, scale_of

_LEAVES = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))


def adapter_layers(adapter: PeftAdapter, *, where: str) -> dict[str, Factors]:
    """Return the factors of each layer, in the number format that they are stored in.

    An adapter that has none, as VeRA's, gives an empty dict.

    Raises:
        UserError: If a layer has one of two factors.
    """
    state, settings = adapter.state, adapter.settings
    layers: dict[str, Factors] = {}
    lone = []
    if settings.variant in ("adalora", "vera") or adapter.target_parameters:
        return {}
    for leaf_a, leaf_b in _LEAVES:
        names = {
            n.removesuffix(leaf) for n in state for leaf in (leaf_a, leaf_b) if n.endswith(leaf)
        }
        for name in sorted(names):
            a, b = state.get(name + leaf_a), state.get(name + leaf_b)
            if a is None or b is None:
                lone.append(name + (leaf_a if a is None else leaf_b))
                continue
            alpha = settings.alpha_of(outermost(name))
            scale = scale_of(a.shape[0], alpha, rslora=settings.rslora)
            layers[name] = Factors(A=a, B=b, scale=scale, is_embedding=leaf_a == _LEAVES[1][0])
    if lone:
        raise UserError(
            Problem(
                id="convert.tensors",
                message=f"`adapter` must hold both factors of each update, but lacks {few(lone)}.",
                key="adapter",
                where=where,
                fix="copy the file again",
            )
        )
    return layers


def with_layers(adapter: PeftAdapter, layers: Mapping[str, Factors]) -> PeftAdapter:
    """Return an adapter with other factors in all of its layers, in settings that give the scales.

    Args:
        adapter: Whatever else it holds is kept.
        layers: Factors of each of its layers.
    """
    return replace(
        adapter,
        settings=settings_of(layers, adapter.settings),
        state={**adapter.state, **factor_state(layers)},
    )


def settings_of(layers: Mapping[str, Factors], settings: LoraSettings) -> LoraSettings:
    """Return settings that give each layer the rank and scale of its factors.

    The most frequent rank and strength are the settings', and others are named by exact paths.

    Args:
        layers: One layer at least.
        settings: Of which all else is kept.
    """
    ranks, alphas = {}, {}
    for name, factors in layers.items():
        path, r = outermost(name), factors.r
        ranks[path] = r
        # Twelve digits, so that 0.1 * 3 / 3 is 0.1 again.
        per_scale = r / scale_of(r, float(r), rslora=settings.rslora)
        alphas[path] = float(f"{factors.scale * per_scale:.12g}")
    r, alpha = mode(ranks.values()), mode(alphas.values())
    return replace(
        settings,
        r=r,
        alpha=alpha,
        rank_pattern={path: rank for path, rank in ranks.items() if rank != r},
        alpha_pattern={path: value for path, value in alphas.items() if value != alpha},
    )
