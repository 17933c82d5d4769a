"""Adapters on parameters that are no layers: the fused weights of a mixture of experts."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_cli.errors import Problem, UserError
from lora_cli.lora.blocks import is_selected, stack_depths
from lora_cli.lora.kinds import kind_of
from lora_cli.lora.parameter import LoraParameter
from lora_cli.lora.patterns import is_inside, matches
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.unmatched import check_patterns, unmatched_error

KEY = "lora.target_parameters"
VARIANTS = ("lora", "lora_fa")


def match_parameters(
    model: nn.Module, target_parameters: Iterable[str], *, saved_modules: tuple[str, ...]
) -> tuple[str, ...]:
    """Select the parameters of an adapter that was trained elsewhere.

    An entry that matches nothing is harmless here, as in `lora_cli.lora.targets.match_targets`.
    Indices of blocks in an adapter file say nothing about parameters: PEFT does not read them so.

    Args:
        model: The base model, before injection.
        target_parameters: Last parts of the names of parameters.
        saved_modules: Modules that were trained whole.

    Returns:
        Exact names of parameters in the order of the model; possibly none.
    """
    patterns = tuple(target_parameters)
    return tuple(
        name
        for name in _matrices(model)
        if any(matches(pattern, name) for pattern in patterns)
        and not is_inside(name.rpartition(".")[0], saved_modules)
    )


def resolve_parameters(
    model: nn.Module,
    target_parameters: tuple[str, ...],
    *,
    saved_modules: tuple[str, ...],
    adapted: Collection[str] = (),
    layers: Sequence[int | str] | None = None,
) -> tuple[str, ...]:
    """Turn `lora.target_parameters` into exact names of parameters.

    Reads names and shapes only: works on the meta device and changes nothing.

    Args:
        model: The base model, before injection.
        target_parameters: Patterns over the names of parameters, such as "experts.down_proj".
        saved_modules: Modules that are trained whole; nothing inside them is selected.
        adapted: Layers that `lora.targets` names.
        layers: Blocks to adapt parameters in, which `lora_cli.lora.blocks.check_blocks` accepted;
            None for all.

    Returns:
        Exact names in the order of the model.

    Raises:
        UnmatchedTargetsError: If a pattern matches no parameter; all such patterns are listed.
        UserError: If a pattern is empty or too long, or a parameter belongs to a layer that
            `lora.targets` names, or is shared with another module.
    """
    problems = check_patterns(target_parameters, key=KEY)
    if problems:
        raise UserError(problems)
    names = match_parameters(model, target_parameters, saved_modules=saved_modules)
    missed = [p for p in target_parameters if not any(matches(p, name) for name in names)]
    if missed:
        dims = {name: value.ndim for name, value in model.named_parameters()}
        raise unmatched_error(
            missed,
            _known(model, saved_modules),
            key=KEY,
            what="weights",
            explain=lambda pattern: _explain(pattern, dims),
        )
    if layers is not None:
        depths = stack_depths(name for name, _ in model.named_parameters(remove_duplicate=False))
        inside = tuple(name for name in names if is_selected(name, layers, depths))
        if names and not inside:
            raise UserError(
                Problem(
                    id="lora.nothing-to-adapt",
                    message="`lora.layers` must leave at least one weight of "
                    "`lora.target_parameters`, but leaves none.",
                    key="lora.layers",
                    fix="name blocks that have experts, or leave lora.target_parameters out",
                )
            )
        names = inside
    problems = _conflicts(model, names, adapted)
    if problems:
        raise UserError(problems)
    return names


def inject_experts(model: nn.Module, names: Iterable[str], settings: LoraSettings) -> None:
    """Put an adapter around parameters, in place; call it after `inject_lora`.

    A module with several of them gets one layer around the other in the order of its parameters,
    the last one outermost, as in PEFT: their places in an adapter file follow from that.

    Args:
        model: The base model.
        names: Exact names of parameters, in the order of the model.
        settings: Variant, ranks and strengths.

    Raises:
        UserError: If the settings ask for what an update of a parameter cannot do; nothing is
            changed then.
    """
    names = tuple(names)
    if not names:
        return
    problems = _unsupported(settings)
    if problems:
        raise UserError(problems)
    for name in names:
        module, _, parameter = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        layer = LoraParameter(
            model.get_submodule(module),
            parameter,
            r=settings.r_of(name),
            alpha=settings.alpha_of(name),
            rslora=settings.rslora,
            freeze_A=settings.variant == "lora_fa",
        )
        setattr(model.get_submodule(parent), last, layer)


def _matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of dense numbers that are matrices or stacks of them, but for the model's."""
    return {
        name: value
        for name, value in model.named_parameters()
        if value.ndim in (2, 3) and value.is_floating_point() and "." in name
    }


def _known(model: nn.Module, saved_modules: tuple[str, ...]) -> tuple[str, ...]:
    """Last two parts of the names of weights that only this setting reaches."""
    modules = dict(model.named_modules())
    return tuple(
        sorted(
            {
                ".".join(name.split(".")[-2:])
                for name in _matrices(model)
                if kind_of(modules[name.rpartition(".")[0]]) is None
                and not is_inside(name.rpartition(".")[0], saved_modules)
                and not name.endswith("bias")
            }
        )
    )


def _explain(pattern: str, dims: Mapping[str, int]) -> str | None:
    found = {number for name, number in dims.items() if matches(pattern, name)}
    if found and not found & {2, 3}:
        return f"has {found.pop()} dimension, not two or three"
    if found:
        return "matches only weights of modules that are trained whole, or of the model itself"
    return None


def _conflicts(model: nn.Module, names: Sequence[str], adapted: Collection[str]) -> list[Problem]:
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    faults: list[tuple[str, str, str]] = []
    for name in names:
        module, _, last = name.rpartition(".")
        if is_inside(module, adapted):
            faults.append((name, "belongs to a layer that `lora.targets` names", module))
        elif owners[id(getattr(model.get_submodule(module), last))] > 1:
            faults.append((name, "is shared with another module", ""))
    return [
        Problem(
            id="lora.bad-parameter",
            message=f'`{KEY}` must name weights that nothing else adapts or shares, but "{name}" '
            f"{fault}.",
            key=KEY,
            fix=f"leave it out, or set lora.exclude=[{module}]" if module else "leave it out",
        )
        for name, fault, module in faults
    ]


def _unsupported(settings: LoraSettings) -> list[Problem]:
    """What an update of a parameter cannot do, since its module decides what it multiplies."""
    rules: list[tuple[str, bool, Any, str]] = [
        ("lora.variant", settings.variant in VARIANTS, settings.variant, " or ".join(VARIANTS)),
        ("lora.dropout", settings.dropout == 0, settings.dropout, "0"),
        ("lora.lora_bias", not settings.lora_bias, "true", "false"),
    ]
    return [
        Problem(
            id="lora.parameter-settings",
            message=f"`{key}` must be {allowed} together with `{KEY}`, but is {value}.",
            key=key,
            allowed=allowed,
            fix=f"{key}={allowed.partition(' ')[0]}, or leave out {KEY}",
        )
        for key, fits, value, allowed in rules
        if not fits
    ]
