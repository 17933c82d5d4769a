"""What several adapters can be combined from: their factors A and B, and modules trained whole."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from lora_cli.errors import Problem, UserError
from lora_cli.lora.patterns import is_inside, outermost
from lora_cli.lora.settings import LoraSettings, scale_of

_PLAIN = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
# What else an adapter may hold, by the name of the tensor; the first that fits counts.
_OTHER = {
    "*.lora_B.bias": "biases of B",
    "*.lora_magnitude_vector": "DoRA magnitudes",
    "*.lora_[ABE]": "AdaLoRA factors",
    "*vera_*": "VeRA vectors",
    "*.trainable_tokens_delta": "trained tokens",
    "*prompt_embeddings": "a trained prefix",
    "*.bias": "trained biases",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """One adapter's update of one layer, ``scale * B A``.

    Attributes:
        A: (r, in_features), (r, num_embeddings), or (r, in_channels, *kernel) of a convolution.
        B: (out_features, r), (embedding_dim, r), or (out_channels, r / groups, 1, ...).
        scale: Factor of the product.
        is_embedding: Whether the tensors are called as those of an embedding.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    is_embedding: bool = False

    @property
    def r(self) -> int:
        """The rank."""
        return self.A.shape[0]

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for every other layer."""
        return self.A.shape[0] // self.B.shape[1]


def read_factors(
    state: Mapping[str, torch.Tensor],
    saved_modules: Sequence[str],
    settings: LoraSettings,
    *,
    where: str,
) -> tuple[dict[str, Factors], dict[str, torch.Tensor]]:
    """Split the tensors of an adapter into factors by layer, and tensors of saved modules.

    Args:
        state: Tensors by the names of `lora_cli.lora.state.adapter_state`.
        saved_modules: Exact paths of the modules that were trained whole.
        settings: What the adapter says about itself.
        where: The adapter's folder, for the message.

    Raises:
        UserError: If there is anything that is neither; everything of that kind is named.
    """
    saved = {name: tensor for name, tensor in state.items() if is_inside(name, saved_modules)}
    rest = {name: tensor for name, tensor in state.items() if name not in saved}
    factors: dict[str, Factors] = {}
    used: set[str] = set()
    for leaf_a, leaf_b in (_PLAIN, _EMBEDDING):
        for name in rest:
            layer = name.removesuffix(f".{leaf_a}")
            other = f"{layer}.{leaf_b}"
            if layer != name and other in rest:
                a, b = rest[name].float(), rest[other].float()
                alpha = settings.alpha_of(outermost(layer))
                scale = scale_of(a.shape[0], alpha, rslora=settings.rslora)
                factors[layer] = Factors(
                    A=a, B=b, scale=scale, is_embedding=leaf_a == _EMBEDDING[0]
                )
                used.update((name, other))
    found = {_what(name) for name in rest if name not in used}
    if found or not factors:
        raise UserError(_no_plain_lora(sorted(found) or ["no LoRA factors"], where))
    return factors, saved


def factor_state(layers: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    """Return the tensors of factors by the names of `lora_cli.lora.state.adapter_state`."""
    state = {}
    for layer, factors in layers.items():
        leaf_a, leaf_b = _EMBEDDING if factors.is_embedding else _PLAIN
        state[f"{layer}.{leaf_a}"] = factors.A
        state[f"{layer}.{leaf_b}"] = factors.B
    return state


def combine_saved(
    adapters: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
) -> dict[str, torch.Tensor]:
    """Return the weighted mean of modules that were trained whole, such as heads.

    A head has no place to start from that all adapters share, so a sum of heads would mean
    nothing: the weights are divided by their sum.

    Args:
        adapters: The tensors of the saved modules of each adapter, by name.
        weights: One number for each adapter.

    Returns:
        New tensors; numbers that are not floating are those of the first adapter.

    Raises:
        UserError: If an adapter lacks a tensor, shapes differ, whole numbers differ, or the
            weights do not sum to more than zero.
    """
    names = sorted(set().union(*adapters))
    lacking = [name for name in names if any(name not in adapter for adapter in adapters)]
    shared = [name for name in names if name not in lacking]
    first = adapters[0]
    unequal = [
        name
        for name in shared
        if any(adapter[name].shape != first[name].shape for adapter in adapters)
        or (
            not first[name].is_floating_point()
            and any(not torch.equal(adapter[name], first[name]) for adapter in adapters)
        )
    ]
    rules = {"are not in every adapter": lacking, "differ in shape or count": unequal}
    problems = [
        Problem(
            id="merge.cannot-combine",
            message="The adapters must have been trained with the same modules whole, but these "
            f"tensors {what}: {few(found)}.",
            key="adapters",
            fix="combine adapters of the same task and `lora.modules_to_save`.",
        )
        for what, found in rules.items()
        if found
    ]
    total = math.fsum(weights)
    if names and not total > 0:
        problems.append(
            Problem(
                id="merge.bad-weights",
                message="`weights` must sum to more than 0, since heads are averaged with them, "
                f"but sum to {total:g}.",
                key="weights",
            )
        )
    if problems:
        raise UserError(problems)
    return {name: _mean([a[name] for a in adapters], weights, total) for name in shared}


def _mean(tensors: Sequence[torch.Tensor], weights: Sequence[float], total: float) -> torch.Tensor:
    if not tensors[0].is_floating_point():
        return tensors[0].clone()
    parts = [
        tensor.double() * (weight / total) for tensor, weight in zip(tensors, weights, strict=True)
    ]
    return torch.stack(parts).sum(0).to(tensors[0].dtype)


def _what(name: str) -> str:
    return next(
        (what for pattern, what in _OTHER.items() if fnmatchcase(name, pattern)),
        f"a tensor of another kind ({name})",
    )


def _no_plain_lora(found: Sequence[str], where: str) -> Problem:
    return Problem(
        id="merge.cannot-combine",
        message="`adapters` must hold factors A and B and modules trained whole, and nothing else, "
        f"but one has {few(found)}.",
        key="adapters",
        where=where,
        fix="merge that adapter into its base with `lora-cli merge DIR`, and train the others on "
        "the merged model.",
    )


def few(names: Sequence[str]) -> str:
    """Return the first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
