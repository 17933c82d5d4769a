r"""Adapters that start from the base weight, in a form that any program can load.

A layer that starts at A0 and B0 computes ``base(x) + scale * (B A - B0 A0) x``. That is an ordinary
update of twice the rank on the untouched base::

    B A - B0 A0 = [B, -B0] [A; A0]

with alpha raised so that the scale stays. Files hold this form; the model that is trained, and
checkpoints, hold A, B, A0 and B0 apart.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from lora_cli.lora.initial import FROM_WEIGHT
from lora_cli.lora.settings import LoraSettings

State = Mapping[str, torch.Tensor]
_A, _B, _START_A, _START_B = ".lora_A.weight", ".lora_B.weight", ".start_A", ".start_B"


def to_portable(
    state: State, settings: LoraSettings
) -> tuple[dict[str, torch.Tensor], LoraSettings]:
    """Return an adapter without starts, twice as wide; one that has none comes back as it is.

    Args:
        state: Tensors by the names of `adapter_state`.
        settings: Of the same adapter.

    Raises:
        ValueError: If some layers have a start and others have none.
    """
    started = {name.removesuffix(_START_A) for name in state if name.endswith(_START_A)}
    if not started:
        return dict(state), settings
    others = {name.removesuffix(_A) for name in state if name.endswith(_A)} - started
    if others:
        raise ValueError(
            f"Every layer must have a start, but {', '.join(sorted(others))} has none."
        )
    portable = {name: t for name, t in state.items() if not name.endswith((_START_A, _START_B))}
    for name in started:
        portable[name + _A] = torch.cat([state[name + _A], state[name + _START_A]])
        portable[name + _B] = torch.cat([state[name + _B], -state[name + _START_B]], dim=1)
    factor = math.sqrt(2) if settings.rslora else 2.0
    return portable, replace(
        settings,
        r=2 * settings.r,
        alpha=factor * settings.alpha,
        rank_pattern={key: 2 * r for key, r in settings.rank_pattern.items()},
        alpha_pattern={key: factor * alpha for key, alpha in settings.alpha_pattern.items()},
        init="kaiming",
        pissa_niter=None,
    )


def from_portable(state: State, settings: LoraSettings) -> dict[str, torch.Tensor]:
    """Return the state of the model that wrote a portable adapter, equal to the last bit.

    Args:
        state: Tensors of a portable adapter.
        settings: Of the model that is trained: where its `init` does not start from the base
            weight, portable and live state are the same.
    """
    live = dict(state)
    if settings.init not in FROM_WEIGHT:
        return live
    for name in [name.removesuffix(_A) for name in state if name.endswith(_A)]:
        A, start_A = state[name + _A].chunk(2)
        B, start_B = state[name + _B].chunk(2, dim=1)
        live |= {
            name + _A: A.contiguous(),
            name + _B: B.contiguous(),
            name + _START_A: start_A.contiguous(),
            name + _START_B: -start_B,
        }
    return live
