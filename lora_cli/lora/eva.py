"""EVA: A starts from what the layers are given (Paischer et al. 2024, arXiv:2410.07170).

A few hundred training rows go through the base model. For each layer that is to be adapted, the
rows of A become the directions in which its inputs vary most: the right singular vectors of the
centred inputs. Directions of all layers compete for the ranks by the share of the variance that
they explain in their layer, so that layers with many important directions get more rank. B is zero.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_cli.errors import Problem, UserError
from lora_cli.lora.initial import check_linear
from lora_cli.lora.kinds import linear_sizes
from lora_cli.lora.layer import AdapterLayer
from lora_cli.lora.settings import LoraSettings

# Directions kept between batches, at least and for each one that may be used: what a batch adds to
# a direction that was dropped is lost.
_KEEP, _SPARE = 64, 4
# Subspace iterations of the randomized SVD; with so many spare directions, few are enough.
_ITERATIONS = 2
# Variance below this share is rounding, in which no direction means anything.
_NOISE = 1e-10


class InputSpectrum:
    """The directions of largest variance among vectors that arrive in batches.

    Incremental SVD (Ross et al. 2008, section 3): the kept directions, scaled, stand for the
    vectors seen so far. Where there are many more directions than are kept, a randomized SVD finds
    them (Halko et al. 2011); its seed is fixed, so the same vectors give the same directions.

    Args:
        keep: Directions to remember.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._count = 0
        self._mean = self._basis = torch.zeros(0)
        self._total = 0.0
        self._values = torch.zeros(0)

    def add(self, x_ND: torch.Tensor) -> None:
        """Take in vectors, one a row, of any floating dtype."""
        x_ND, added = x_ND.detach().float(), len(x_ND)
        if added == 0:
            return
        mean = x_ND.mean(dim=0)
        stack = [x_ND - mean]
        self._total += float(stack[0].square().sum())
        if self._count:
            # What the distance of the two means adds to the variance of all vectors together.
            weight = math.sqrt(self._count * added / (self._count + added))
            stack += [self._values[:, None] * self._basis, weight * (self._mean - mean)[None]]
            self._total += float(stack[2].square().sum())
            mean = (self._count * self._mean + added * mean) / (self._count + added)
        self._values, self._basis = _right_singular(torch.cat(stack), keep=self.keep)
        self._mean, self._count = mean, self._count + added

    @property
    def shares(self) -> list[float]:
        """Share of all variance in each direction, largest first; without those that are noise."""
        if self._total == 0:
            return []
        shares = (self._values.square() / self._total).tolist()
        return [share for share in shares if share > _NOISE]

    def directions(self, count: int) -> torch.Tensor:
        """Return the first `count` directions as unit rows; their largest entry is > 0."""
        rows = self._basis[:count]
        signs = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()
        return rows * signs


def _right_singular(stack: torch.Tensor, *, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return singular values and right singular vectors (as rows), largest first."""
    keep = min(keep, *stack.shape)
    if min(stack.shape) <= 2 * keep:
        _, values, rows = torch.linalg.svd(stack, full_matrices=False)
        return values[:keep], rows[:keep]
    with torch.random.fork_rng(devices=[stack.device] if stack.is_cuda else []):
        torch.manual_seed(0)
        _, values, columns = torch.svd_lowrank(stack, q=keep, niter=_ITERATIONS)
    return values, columns.T.contiguous()


def input_spectra(
    model: nn.Module,
    ranks: Mapping[str, int],
    *,
    batches: Iterable[Any],
    forward: Callable[[Any], object],
    rho: float,
) -> dict[str, InputSpectrum]:
    """Run the model over batches, and return the spectrum of the inputs of each layer.

    Layers that are given the very same tensor share one spectrum. Beside the forward pass, each
    takes the memory of some hundred input vectors, however many rows there are.

    Args:
        model: The base model, without adapters, in evaluation mode.
        ranks: Rank of each layer to watch, by path, before they are spread.
        batches: What `forward` takes; positions that an "attention_mask" in them hides are left
            out.
        forward: Runs the model on a batch.
        rho: Largest rank of a layer over its rank here.

    Raises:
        UserError: If a layer is given NaN or infinity.
    """
    layers = {name: model.get_submodule(name) for name in ranks}
    watch = _Watch()
    handles = []
    for name, layer in layers.items():
        keep = max(_KEEP, _SPARE * _largest(ranks[name], rho))
        keep = min(keep, linear_sizes(layer)[0])
        handles.append(layer.register_forward_pre_hook(watch.hook(name, keep), with_kwargs=True))
    try:
        with torch.no_grad():
            for batch in batches:
                watch.start(dict(_masks(batch)))
                forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return watch.spectra


class _Watch:
    """Takes in the inputs of several layers, each tensor once."""

    def __init__(self) -> None:
        self.spectra: dict[str, InputSpectrum] = {}
        self._masks: dict[str, torch.Tensor] = {}
        self._owners: dict[str, str] = {}
        self._seen: dict[int, tuple[weakref.ref[torch.Tensor], int, str]] = {}

    def start(self, masks: dict[str, torch.Tensor]) -> None:
        """Begin a batch."""
        self._masks = masks
        self._seen.clear()

    def hook(self, name: str, keep: int) -> Callable[..., None]:
        """Return a forward pre-hook for the layer at path `name`."""

        def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
            if name not in self._owners:
                self._owners[name] = self._owner(x, keep) or name
            owner = self._owners[name]
            if owner == name:
                self._seen[id(x)] = (weakref.ref(x), x._version, name)
                spectrum = self.spectra.setdefault(name, InputSpectrum(keep))
                spectrum.add(_finite(_visible(x, self._masks, name), name))
            else:
                self.spectra[name] = self.spectra[owner]

        return look

    def _owner(self, x: torch.Tensor, keep: int) -> str | None:
        """Return the layer that was given this very tensor, and keeps enough of it."""
        seen = self._seen.get(id(x))
        if seen is None or seen[0]() is not x or seen[1] != x._version:
            return None
        return seen[2] if self.spectra[seen[2]].keep >= keep else None


def _masks(batch: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the attention masks of tokens in a batch, however deep."""
    if isinstance(batch, Mapping):
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                if str(name).endswith("attention_mask") and value.ndim == 2:
                    yield str(name), value.bool()
            else:
                yield from _masks(value)


def _visible(x: torch.Tensor, masks: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return the vectors of an input (..., D) as rows, without those that a mask hides.

    A mask counts where the input has its shape, (B, T, D) or (B T, D); that of a decoder's inputs
    goes before in a decoder.
    """
    rows = x.reshape(-1, x.shape[-1])
    is_decoder = "decoder" in name
    for key in sorted(masks, key=lambda key: key.startswith("decoder") != is_decoder):
        mask = masks[key]
        if x.shape[:-1] in (mask.shape, (mask.numel(),)):
            return rows[mask.reshape(-1)]
    return rows


def _finite(x: torch.Tensor, name: str) -> torch.Tensor:
    if not bool(torch.isfinite(x).all()):
        raise UserError(
            Problem(
                id="lora.eva-inputs",
                message="`lora.init` must be another than eva where inputs of a layer are NaN or "
                f'infinity, but is eva with "{name}".',
                key="lora.init",
                fix="model.dtype=float32, if the base computes in a lower precision",
            )
        )
    return x


def spread_ranks(
    shares: Mapping[str, Sequence[float]], ranks: Mapping[str, int], *, rho: float
) -> dict[str, int]:
    """Give the sum of all ranks to the directions that explain the most of their layer's variance.

    Args:
        shares: Of each layer: what each direction explains, largest first.
        ranks: Rank of each layer without EVA.
        rho: No layer gets more than `rho` times its rank; 1 leaves every rank as it is.

    Returns:
        The rank of each layer; it may be 0.

    Raises:
        UserError: If there are too few directions.
    """
    candidates = [
        (-share, place, name)
        for place, name in enumerate(ranks)
        for share in shares.get(name, ())[: _largest(ranks[name], rho)]
    ]
    budget = sum(ranks.values())
    if len(candidates) < budget:
        fewest = min(ranks, key=lambda name: len(shares.get(name, ())) / ranks[name])
        found = len(shares.get(fewest, ()))
        raise UserError(
            Problem(
                id="lora.eva-rows",
                message=f"`lora.eva.rows` must show every layer as many directions as it has rank, "
                f'but "{fewest}" was given {found} for a rank of {ranks[fewest]}.',
                key="lora.eva.rows",
                fix="raise lora.eva.rows, lower lora.r, or leave the layer out with lora.exclude",
            )
        )
    spread = dict.fromkeys(ranks, 0)
    for _, _, name in sorted(candidates)[:budget]:
        spread[name] += 1
    return spread


def _largest(r: int, rho: float) -> int:
    return round(r * rho)


def eva_factors(
    model: nn.Module,
    names: Iterable[str],
    settings: LoraSettings,
    *,
    batches: Iterable[Any],
    forward: Callable[[Any], object],
    rho: float,
) -> dict[str, torch.Tensor]:
    """Return the start of A for each layer that gets a rank, shape (rank, in_features).

    It is a pure function of model, rows and settings: the same command gives the same ranks again.

    Args:
        model: The base model, without adapters, in evaluation mode.
        names: Exact paths of the layers to adapt.
        settings: Of the adapter, with the ranks to spread.
        batches: Training rows, as in `input_spectra`.
        forward: As in `input_spectra`.
        rho: As in `spread_ranks`.

    Raises:
        UserError: If a layer is not linear or given no numbers, or the rows are too few.
    """
    ranks = {name: settings.r_of(name) for name in names}
    problems = check_linear({name: model.get_submodule(name) for name in ranks}, init="eva")
    if problems:
        raise UserError(problems)
    spectra = input_spectra(model, ranks, batches=batches, forward=forward, rho=rho)
    shares = {name: spectrum.shares for name, spectrum in spectra.items()}
    spread = spread_ranks(shares, ranks, rho=rho)
    return {name: spectra[name].directions(r) for name, r in spread.items() if r > 0}


def eva_settings(settings: LoraSettings, factors: Mapping[str, torch.Tensor]) -> LoraSettings:
    """Return the settings with the rank of each layer, and alpha such that its scale stays."""
    ranks = {name: len(A) for name, A in factors.items()}
    alphas = {}
    for name, r in ranks.items():
        before = settings.r_of(name)
        growth = math.sqrt(r / before) if settings.rslora else r / before
        alphas[name] = settings.alpha_of(name) * growth
    return replace(settings, rank_pattern=ranks, alpha_pattern=alphas)


@torch.no_grad()
def start_from_inputs(model: nn.Module, factors: Mapping[str, torch.Tensor]) -> None:
    """Copy the factors of `eva_factors` into the adapters of a model, in place."""
    for name, factor in factors.items():
        layer = model.get_submodule(name)
        if isinstance(layer, AdapterLayer):
            layer.own_tensors()["lora_A.weight"].copy_(factor)
