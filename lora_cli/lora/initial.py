"""Where the factors of an adapter start, other than Kaiming-uniform A and zero B.

PiSSA and OLoRA start from a part of the base weight. Their papers take that part out of the base;
here it stays, and the layer takes the start away from its update instead (see
`LoraLinear.start_from`): the function at the start is the base's, which no rounding of a changed
weight disturbs, and the base weights are those that everybody has.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lora_cli.errors import Problem, UserError
from lora_cli.lora.kinds import dense_weight, is_linear, linear_sizes
from lora_cli.lora.layer import AdapterLayer
from lora_cli.lora.patterns import last_parts, outermost
from lora_cli.lora.settings import LoraSettings

Factors = tuple[torch.Tensor, torch.Tensor]


def pissa_factors(weight: torch.Tensor, *, r: int, scale: float, niter: int | None) -> Factors:
    """Return A and B from the largest singular directions (arXiv:2404.02948, eq. 2 and 3).

    With ``W = U S V^T``: ``A = sqrt(S_r / scale) V_r^T`` and ``B = U_r sqrt(S_r / scale)``, so that
    ``scale * B A`` is the best approximation of W of that rank.

    Args:
        weight: W, shape (out_features, in_features), float32 or wider.
        r: Rank.
        scale: Factor of the update.
        niter: Subspace iterations of a randomized decomposition (Halko et al. 2011), which draws
            from torch's global generator; None decomposes exactly.
    """
    if niter is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(weight, q=r, niter=niter)
        Vh = V.mH
    root = (S[:r] / scale).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def olora_factors(
    weight: torch.Tensor, *, r: int, scale: float = 1.0, niter: int | None = None
) -> Factors:
    """Return A and B from a QR decomposition (arXiv:2406.01775): ``B = Q_r``, ``A = R_r``.

    Args:
        weight: W, shape (out_features, in_features), float32 or wider.
        r: Rank.
        scale: Not used: the update starts at ``scale * Q_r R_r``.
        niter: Not used.
    """
    del scale, niter
    Q, R = torch.linalg.qr(weight)
    return R[:r], Q[:, :r]


# Starts that are taken from the base weight.
FROM_WEIGHT: Mapping[str, Callable[..., Factors]] = {
    "olora": olora_factors,
    "pissa": pissa_factors,
}


def start_adapters(model: nn.Module, settings: LoraSettings) -> None:
    """Give the factors of every adapter in a model the start that `settings.init` names, in place.

    Call it right after `inject_lora`. "kaiming" is how layers start by themselves, and "eva" is
    `lora_cli.lora.eva.start_from_inputs`: both leave the model as it is. Random numbers come from
    torch's global generator, layer by layer in the order of the modules.

    Raises:
        UserError: If layers cannot take such a start; no adapter is changed then.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AdapterLayer) and _has_factors(module)
    }
    if settings.init == "gaussian":
        for name, layer in layers.items():
            _start_gaussian(layer, settings.r_of(outermost(name)))
    if settings.init not in FROM_WEIGHT:
        return
    problems = list(_misfits(layers, settings))
    if problems:
        raise UserError(problems)
    start: Any
    for name, start in layers.items():
        weight = dense_weight(start.base_layer).detach()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        factors = FROM_WEIGHT[settings.init]
        start.start_from(
            *factors(wide, r=settings.r_of(name), scale=start.scale, niter=settings.pissa_niter)
        )


def check_linear(layers: Mapping[str, nn.Module], *, init: str) -> list[Problem]:
    """Report the base layers, by path, that are not linear: `init` has no meaning for them."""
    found = [name for name, layer in layers.items() if not is_linear(layer)]
    if not found:
        return []
    kinds = [f'"{name}" ({type(layers[name]).__name__})' for name in found]
    return [
        Problem(
            id="lora.init-kind",
            message="`lora.init` must be kaiming or gaussian where layers that are not linear are "
            f"adapted, but is {init} with {_some(kinds)}.",
            key="lora.init",
            fix=f"leave them out with lora.exclude=[{','.join(last_parts(found))}], or take "
            "lora.init=kaiming",
        )
    ]


def _has_factors(layer: AdapterLayer) -> bool:
    """Whether a layer is of low rank, rather than for trained tokens."""
    return any(name.startswith("lora_") for name in layer.own_tensors())


def _misfits(layers: Mapping[str, AdapterLayer], settings: LoraSettings) -> Iterator[Problem]:
    """Report the layers that cannot start from their weight."""
    bases = {name: layer.base_layer for name, layer in layers.items() if name == outermost(name)}
    yield from check_linear(bases, init=settings.init)
    linear = {name: base for name, base in bases.items() if is_linear(base)}
    sides = {name: min(linear_sizes(base)) for name, base in linear.items()}
    narrow = [
        f'"{name}" ({settings.r_of(name)} against {side})'
        for name, side in sides.items()
        if settings.r_of(name) > side
    ]
    if narrow:
        yield Problem(
            id="lora.init-rank",
            message="`lora.init` must be kaiming or gaussian where a rank is above the smaller "
            f"side of the weight, but is {settings.init} with {_some(narrow)}.",
            key="lora.init",
            fix="lower lora.r, or the ranks in lora.rank_pattern",
        )
    broken = [
        f'"{name}"'
        for name, base in linear.items()
        if not bool(torch.isfinite(dense_weight(base)).all())
    ]
    if broken:
        yield Problem(
            id="lora.init-weight",
            message="`lora.init` must be kaiming or gaussian where a base weight holds NaN or "
            f"infinity, but is {settings.init} with {_some(broken)}.",
            key="lora.init",
            fix="get the base model again: its weights are damaged",
        )


def _some(found: list[str]) -> str:
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more


@torch.no_grad()
def _start_gaussian(layer: AdapterLayer, r: int) -> None:
    """Draw A with spread ``1 / r``; B is zero already. Embeddings, whose A is zero, stay so."""
    A = layer.own_tensors().get("lora_A.weight")
    if A is not None:
        A.normal_(std=1 / r)
