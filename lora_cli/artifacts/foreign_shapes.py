"""Whether updates fit into the layers of a base model, by paths and shapes."""

from collections.abc import Iterator, Mapping

from torch import nn

from lora_cli.artifacts.foreign_file import Base, BaseLayer
from lora_cli.errors import Problem, UserError, nearest_name
from lora_cli.lora.factors import Factors, few
from lora_cli.lora.kinds import kind_of, linear_sizes


def base_layers(model: nn.Module) -> dict[str, BaseLayer]:
    """Return the layers of a model that can be adapted; it may be on the meta device."""
    found = {}
    for name, module in model.named_modules():
        kind = kind_of(module)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            shape = (module.in_channels, *module.kernel_size)
            found[name] = BaseLayer(
                kind="conv", a=shape, b=module.out_channels, groups=module.groups
            )
        elif isinstance(module, nn.Embedding):
            found[name] = BaseLayer(
                kind="embedding", a=(module.num_embeddings,), b=module.embedding_dim
            )
        elif kind in ("linear", "conv1d", "quantized"):
            in_features, out_features = linear_sizes(module)
            found[name] = BaseLayer(kind=kind, a=(in_features,), b=out_features)
    return found


def check_layers(layers: Mapping[str, Factors], base: Base | None, *, where: str) -> None:
    """Compare updates with themselves, and with a base where it is known.

    Raises:
        UserError: If A and B are of different ranks, or a layer is not in the base or of another
            shape there; everything of that kind is named.
    """
    problems = list(_check_ranks(layers, where))
    if base is not None and not problems:
        problems = [*_check_names(layers, base, where), *_check_shapes(layers, base, where)]
    if problems:
        raise UserError(problems)


def _check_ranks(layers: Mapping[str, Factors], where: str) -> Iterator[Problem]:
    bad = []
    for name, factors in layers.items():
        a, b = tuple(factors.A.shape), tuple(factors.B.shape)
        # B of a convolution in groups is as long as the rank of one group.
        groups = len(b) > 2 and b[1] and a[0] % b[1] == 0
        if len(a) < 2 or len(a) != len(b) or not a[0] or (a[0] != b[1] and not groups):
            bad.append(f"{name} with {a} and {b}")
    if bad:
        yield Problem(
            id="convert.shape",
            message="`adapter` must hold A (r x inputs) and B (outputs x r) of one rank for each "
            f"layer, but has {few(bad)}.",
            key="adapter",
            where=where,
            fix="merge the adapter with the program that made it, and use `lora-cli extract`",
        )


def _check_names(layers: Mapping[str, Factors], base: Base, where: str) -> Iterator[Problem]:
    unknown = [name for name in layers if name not in base.layers]
    if unknown:
        near = nearest_name(unknown[0], base.layers)
        yield Problem(
            id="convert.unknown-layer",
            message=f"`adapter` must belong to {base.name}, but that has no layer {few(unknown)}.",
            key="adapter",
            where=where,
            allowed=near and f"names such as {near}",
            fix="base=DIR with the model that the adapter was trained on",
        )


def _check_shapes(layers: Mapping[str, Factors], base: Base, where: str) -> Iterator[Problem]:
    bad = []
    for name, factors in layers.items():
        if (layer := base.layers.get(name)) is None:
            continue
        a, b = tuple(factors.A.shape[1:]), factors.B.shape[0]
        if (a, b) != (layer.a, layer.b) or factors.groups != layer.groups:
            expected = f"(r, {', '.join(map(str, layer.a))}) and ({layer.b}, r)"
            found = f"{tuple(factors.A.shape)} and {tuple(factors.B.shape)}"
            bad.append(f"{name}: {found} instead of {expected}")
    if bad:
        yield Problem(
            id="convert.shape",
            message=f"`adapter` must have the shapes of {base.name}, but has {few(bad)}.",
            key="adapter",
            where=where,
            fix="base=DIR with the model that the adapter was trained on",
        )
