"""Several adapters of one base model put together into one.

An adapter changes a layer by ``scale * B A``. With weights w, two methods keep exactly what they
are given, up to the rank asked for:

* ``cat``: the sum of the weighted updates, with the ranks added up: factors side by side;
* ``svd``: the best approximation of that sum of a smaller rank (truncated singular values).

The others work on A and B apart, entry by entry, each multiplied by ``sqrt(|w * scale|)`` (A also
by the sign of w). They keep the rank, and approximate: the product of two sums has cross terms.

* ``linear``: the sum;
* ``magnitude_prune``: the sum of the largest entries, without their sign;
* ``ties``: of the largest entries, the mean of those that agree with the sign of the majority
  (Yadav et al. 2023, "TIES-Merging", section 3, arXiv:2306.01708);
* ``dare_linear``: the sum of entries kept at random and divided by the chance of that
  (Yu et al. 2023, "DARE", section 3.2, arXiv:2311.03099);
* ``dare_ties``: of entries kept so, the mean of those that agree, as in ``ties``.

The factors are what PEFT's ``add_weighted_adapter`` gives. Where that has more than one choice or
is wrong, ours differs: a rank is that of the layer rather than the largest of the adapter, and the
factors of a grouped convolution are put together group by group.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from lora_cli.errors import Problem, UserError
from lora_cli.lora.factors import Factors, few

Method = Literal["linear", "cat", "svd", "ties", "dare_ties", "dare_linear", "magnitude_prune"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True, kw_only=True, slots=True)
class Blend:
    """How to put adapters together.

    Attributes:
        weights: One number for each adapter; negative ones take the adapter away.
        method: See the module.
        density: Share of the entries of A and B that is kept, above 0 and at most 1, by ``ties``,
            ``magnitude_prune`` and ``dare_...``.
        majority_sign: Sign that counts in ``..ties``: that of the sum of the entries ("total"), or
            the one that most entries have ("frequency"). Weights have no part in it, and a draw
            is positive.
        r: Rank of ``svd``; None takes the largest that the adapters have in a layer. A layer gets
            less where that is exact already.
        seed: Decides what ``dare_...`` keeps.
    """

    weights: Sequence[float]
    method: Method = "linear"
    density: float = 0.5
    majority_sign: Literal["total", "frequency"] = "total"
    r: int | None = None
    seed: int = 42


def combine_factors(adapters: Sequence[Mapping[str, Factors]], how: Blend) -> dict[str, Factors]:
    """Put the updates of several adapters together, layer by layer in the order of names.

    A layer that an adapter leaves alone counts for that adapter as not given, as in PEFT: in
    ``linear`` like zeros, in ``ties`` without a voice.

    Args:
        adapters: The factors of each adapter by layer.
        how: Method and weights.

    Returns:
        New contiguous float32 factors of scale 1, by layer in sorted order.

    Raises:
        ValueError: If there is not one finite weight for each adapter, or `density` or `r` is
            outside its range.
        UserError: If the ranks or shapes of a layer do not go together, or a result is not finite;
            all such layers are named.
    """
    _check_blend(how, len(adapters))
    layers = {
        name: [
            (adapter[name], weight)
            for adapter, weight in zip(adapters, how.weights, strict=True)
            if name in adapter
        ]
        for name in sorted(set().union(*adapters))
    }
    problems = _check_layers({name: [f for f, _ in given] for name, given in layers.items()}, how)
    if problems:
        raise UserError(problems)
    generator = torch.Generator().manual_seed(how.seed)
    combined = {name: _combine_layer(given, how, generator) for name, given in layers.items()}
    overflown = [name for name, f in combined.items() if not _is_finite(f.A, f.B)]
    if overflown:
        raise UserError(
            Problem(
                id="merge.bad-weights",
                message="`weights` must leave the factors within the range of float32, but do not "
                f"in: {few(overflown)}.",
                key="weights",
                fix="use smaller weights",
            )
        )
    return combined


def _check_blend(how: Blend, count: int) -> None:
    if len(how.weights) != count or not all(math.isfinite(weight) for weight in how.weights):
        raise ValueError(f"weights must be {count} finite numbers, but are {list(how.weights)}.")
    if not 0 < how.density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, but is {how.density}.")
    if how.r is not None and how.r < 1:
        raise ValueError(f"r must be at least 1, but is {how.r}.")


def _check_layers(layers: Mapping[str, Sequence[Factors]], how: Blend) -> list[Problem]:
    shapes, ranks, groups = [], [], []
    for name, given in layers.items():
        first = given[0]
        if any(_sizes(factors) != _sizes(first) for factors in given):
            shapes.append(name)
        elif how.method not in ("cat", "svd") and any(f.r != first.r for f in given):
            ranks.append(f"{name} ({', '.join(str(f.r) for f in given)})")
        elif how.method == "svd" and how.r is not None and how.r % first.groups:
            groups.append(f"{name} ({first.groups})")
    problems = []
    if shapes:
        problems.append(
            Problem(
                id="merge.cannot-combine",
                message="The adapters must be of the same base model, but their shapes differ "
                f"in: {few(shapes)}.",
                key="adapters",
            )
        )
    if ranks:
        problems.append(
            Problem(
                id="merge.cannot-combine",
                message="`method` must be cat or svd where the ranks of adapters differ, but is "
                f"{how.method}, and they differ in: {few(ranks)}.",
                key="method",
                allowed="cat, svd",
                fix="method=svd gives one rank, method=cat adds the ranks up.",
            )
        )
    if groups:
        problems.append(
            Problem(
                id="merge.cannot-combine",
                message="`r` must be a multiple of the groups of every convolution, but "
                f"{how.r} is not one of: {few(groups)}.",
                key="r",
            )
        )
    return problems


def _is_finite(*tensors: torch.Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _sizes(factors: Factors) -> tuple[object, ...]:
    """What adapters of one base model have in common in a layer, whatever their rank."""
    a, b = factors.A.shape, factors.B.shape
    return a[1:], b[0], b[2:], factors.groups, factors.is_embedding


def _combine_layer(
    given: Sequence[tuple[Factors, float]], how: Blend, generator: torch.Generator
) -> Factors:
    first = given[0][0]
    if how.method in ("cat", "svd"):
        a, b = _side_by_side(given)
        # Numbers beyond float32 cannot be decomposed; `combine_factors` tells of them.
        if how.method == "svd" and _is_finite(a):
            r = how.r or max(factors.r for factors, _ in given)
            a, b = _truncate(a, b, r // first.groups)
    else:
        strengths = [weight * factors.scale for factors, weight in given]
        roots = torch.tensor([math.sqrt(abs(strength)) for strength in strengths])
        signs = torch.tensor([-1.0 if strength < 0 else 1.0 for strength in strengths])
        # A for all adapters before B: the order in which random numbers are drawn.
        a = _blend([factors.A for factors, _ in given], roots * signs, how, generator)
        b = _blend([factors.B for factors, _ in given], roots, how, generator)
    return Factors(
        A=a.reshape(-1, *first.A.shape[1:]).float().contiguous(),
        B=b.reshape(first.B.shape[0], -1, *first.B.shape[2:]).float().contiguous(),
        scale=1.0,
        is_embedding=first.is_embedding,
    )


def _side_by_side(given: Sequence[tuple[Factors, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (groups, sum of r / groups, n) and (groups, out / groups, sum of r / groups)."""
    parts_a, parts_b = [], []
    for factors, weight in given:
        groups = factors.groups
        per_group = factors.r // groups
        a = factors.A * weight * factors.scale
        parts_a.append(a.reshape(groups, per_group, -1))
        parts_b.append(factors.B.reshape(groups, -1, per_group))
    return torch.cat(parts_a, dim=1), torch.cat(parts_b, dim=2)


def _truncate(a: torch.Tensor, b: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best factors of rank `r` of each ``b @ a``, with orthonormal rows in the first.

    ``b = Q_b R_b`` and ``a^T = Q_a R_a``: only the small ``R_b R_a^T`` needs to be decomposed,
    and the update itself, as large as the base weight, is never built.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    left = q_b @ (u[..., :r] * s[..., None, :r])
    return vh[..., :r, :] @ q_a.mT, left


def _blend(
    tensors: Sequence[torch.Tensor], weights: torch.Tensor, how: Blend, generator: torch.Generator
) -> torch.Tensor:
    stacked = torch.stack([_sparse(tensor, how, generator) for tensor in tensors])
    weighted = stacked * weights.view(-1, *(1 for _ in tensors[0].shape))
    if how.method not in ("ties", "dare_ties"):
        return weighted.sum(0)
    votes = stacked if how.majority_sign == "total" else stacked.sign()
    elected = torch.where(votes.sum(0) >= 0, 1, -1)
    agrees = stacked.sign() == elected
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _sparse(tensor: torch.Tensor, how: Blend, generator: torch.Generator) -> torch.Tensor:
    if how.method == "linear":
        return tensor
    if how.method in ("dare_linear", "dare_ties"):
        chance = torch.full_like(tensor, how.density)
        return tensor * torch.bernoulli(chance, generator=generator) / how.density
    kept = tensor.abs().flatten().topk(int(how.density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel()).index_fill_(0, kept, 1)
    return tensor * mask.view_as(tensor)
