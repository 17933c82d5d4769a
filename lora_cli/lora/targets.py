"""Which layers get an adapter: names, globs and keywords to exact module paths."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lora_cli.errors import Problem, UserError
from lora_cli.lora.blocks import block_of, check_blocks, in_pattern, is_selected, stack_depths
from lora_cli.lora.build import adaptable_kinds
from lora_cli.lora.kinds import is_linear, kind_of, read_by_others
from lora_cli.lora.patterns import is_inside, last_parts, matches
from lora_cli.lora.unmatched import UnmatchedTargetsError, check_patterns, unmatched_error
from lora_cli.models.heads import head_names, output_embeddings

Targets = tuple[str, ...] | Literal["auto", "all-linear"]


@dataclass(frozen=True, slots=True)
class ResolvedTargets:
    """The layers to adapt.

    Attributes:
        names: Exact module paths, in the order of the model's modules.
        by_pattern: For each target pattern the layers among `names` that it selects.
    """

    names: tuple[str, ...]
    by_pattern: Mapping[str, tuple[str, ...]]

    @property
    def counts(self) -> dict[str, int]:
        """For each target pattern the number of layers that get an adapter through it."""
        return {pattern: len(names) for pattern, names in self.by_pattern.items()}


def layer_names(model: nn.Module, variant: str = "lora") -> tuple[str, ...]:
    """Return the paths of all layers that a variant can adapt, in module order."""
    kinds, unread = adaptable_kinds(variant), read_by_others(model)
    return tuple(
        name
        for name, module in model.named_modules()
        if kind_of(module) in kinds and name not in unread
    )


def match_targets(
    model: nn.Module,
    *,
    targets: tuple[str, ...] | Literal["all-linear"],
    exclude: tuple[str, ...] = (),
    saved_modules: tuple[str, ...],
    variant: str = "lora",
    layers: Sequence[int] | None = None,
    layers_pattern: Sequence[str] = (),
) -> tuple[str, ...]:
    """Select the layers of an adapter that was trained elsewhere.

    Unlike in a recipe, an entry that matches nothing is harmless here: the adapter's tensors are
    then checked against the selected layers, strictly in both directions.

    Args:
        model: The base model, before injection.
        targets: Patterns, or "all-linear".
        exclude: Patterns of layers to leave out.
        saved_modules: Modules that were trained whole.
        variant: Which variant adapts them.
        layers: Indices of the blocks to adapt layers in. As in PEFT, they say nothing about
            layers that `targets` names by their whole path.
        layers_pattern: Names of the lists that hold these blocks; empty for any.

    Returns:
        Exact module paths in module order; possibly none.
    """
    is_all = targets == "all-linear"

    def is_meant(name: str) -> bool:
        if is_all or name in targets:
            return True
        inside = not layers or in_pattern(name, layers, layers_pattern)
        return inside and any(matches(pattern, name) for pattern in targets)

    return tuple(
        name
        for name in _eligible(model, saved_modules, variant=variant, all_linear=is_all)
        if is_meant(name) and not any(matches(pattern, name) for pattern in exclude)
    )


def resolve_targets(
    model: nn.Module,
    *,
    targets: Targets,
    exclude: tuple[str, ...],
    auto: tuple[str, ...] | None,
    saved_modules: tuple[str, ...],
    variant: str = "lora",
    layers: Sequence[int | str] | None = None,
) -> ResolvedTargets:
    """Turn `lora.targets`, `lora.exclude` and `lora.layers` into exact module paths.

    Reads names only: works on the meta device and changes nothing.

    Args:
        model: The base model, before injection.
        targets: Patterns (see `matches`), for layers of every kind that the variant can adapt;
            "auto" for those of the family; "all-linear" for every linear layer but heads and
            output embeddings.
        exclude: Patterns of layers to leave out.
        auto: The family's usual patterns, or None for a family that is not known.
        saved_modules: Modules that are trained whole; nothing inside them is selected.
        variant: Which variant is to adapt them.
        layers: Blocks to adapt layers in (see `lora_cli.lora.blocks`), or None for all.

    Raises:
        UnmatchedTargetsError: If a pattern matches no layer; all such patterns are listed.
        UserError: If `targets` is "auto" for an unknown family, no layer is left (of all, or of an
            entry that the user wrote), a pattern is empty or too long, a block is not there, or a
            selected layer shares its weight with another one.
    """
    known = layer_names(model, variant)
    is_all = targets == "all-linear"
    patterns = _patterns(targets, auto, last_parts(known))
    problems = check_patterns(patterns, key="lora.targets")
    problems += check_patterns(exclude, key="lora.exclude")
    if problems:
        raise UserError(problems)
    eligible = _eligible(model, saved_modules, variant=variant, all_linear=is_all)
    found = {"all-linear": eligible} if is_all else _select(patterns, eligible)
    if targets == "auto":
        found = _without_absent(found)
    _check_matched(model, found, exclude, known=known, eligible=eligible, variant=variant)
    meant = {name for names in found.values() for name in names}
    kept = [
        name
        for name in eligible
        if name in meant and not any(matches(pattern, name) for pattern in exclude)
    ]
    if not kept:
        raise UserError(_nothing_left("lora.exclude" if exclude else "lora.targets", eligible))
    if layers is not None:
        kept = _in_blocks(model, kept, layers)
    _check_untied(model, kept)
    resolved = ResolvedTargets(names=tuple(kept), by_pattern=_restrict(found, kept))
    if targets != "auto":
        _check_none_vanished(resolved.counts, exclude)
    return resolved


def _select(patterns: Iterable[str], names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    everything = tuple(names)
    return {
        pattern: tuple(name for name in everything if matches(pattern, name))
        for pattern in patterns
    }


def _without_absent(found: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Drop usual names that this model of the family lacks: BLIP-2 speaks through OPT or T5."""
    there = {pattern: names for pattern, names in found.items() if names}
    return there or found


def _restrict(
    found: Mapping[str, tuple[str, ...]], names: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    kept = frozenset(names)
    return {
        pattern: tuple(name for name in selected if name in kept)
        for pattern, selected in found.items()
    }


def _patterns(
    targets: Targets, auto: tuple[str, ...] | None, known: tuple[str, ...]
) -> tuple[str, ...]:
    if targets == "all-linear":
        return ()
    if targets != "auto":
        return targets
    if auto is None:
        raise UserError(
            Problem(
                id="lora.unknown-family",
                message="`lora.targets` must name layers for this model family, "
                'but is "auto", and the usual ones are not known.',
                key="lora.targets",
                allowed=", ".join((*known, "all-linear")),
                fix='name some of these layers, or set "lora.targets=all-linear".',
            )
        )
    return auto


def _eligible(
    model: nn.Module, saved_modules: tuple[str, ...], *, variant: str, all_linear: bool
) -> tuple[str, ...]:
    """Layers outside of saved modules; with `all_linear`, linear ones outside of heads too."""
    modules = dict(model.named_modules())
    left_out = set(saved_modules)
    if all_linear:
        left_out.update(head_names(model), output_embeddings(model))
    return tuple(
        name
        for name in layer_names(model, variant)
        if not is_inside(name, left_out) and (not all_linear or is_linear(modules[name]))
    )


def _check_none_vanished(counts: Mapping[str, int], exclude: tuple[str, ...]) -> None:
    """Refuse an entry of which `lora.exclude` or `lora.layers` leave nothing."""
    gone = [pattern for pattern, count in counts.items() if not count]
    if gone:
        key = "lora.exclude" if exclude else "lora.layers"
        raise UserError(
            Problem(
                id="lora.nothing-to-adapt",
                message=f"`{key}` must leave at least one layer of each entry of `lora.targets`, "
                f"but leaves none of {', '.join(gone)}.",
                key=key,
                fix=f"take {', '.join(gone)} out of lora.targets",
            )
        )


def _nothing_left(key: str, names: Iterable[str]) -> Problem:
    return Problem(
        id="lora.nothing-to-adapt",
        message=f"`{key}` must leave at least one layer of `lora.targets`, but leaves none.",
        key=key,
        allowed=", ".join(last_parts(names)) or None,
    )


def _in_blocks(model: nn.Module, names: list[str], layers: Sequence[int | str]) -> list[str]:
    depths = stack_depths(name for name, _ in model.named_parameters(remove_duplicate=False))
    stacks = [block.stack for block in map(block_of, names) if block is not None]
    problems = check_blocks(layers, {stack: depths[stack] for stack in dict.fromkeys(stacks)})
    if problems:
        raise UserError(problems)
    kept = [name for name in names if is_selected(name, layers, depths)]
    if not kept:
        raise UserError(_nothing_left("lora.layers", ()))
    return kept


def _check_matched(
    model: nn.Module,
    found: Mapping[str, tuple[str, ...]],
    exclude: tuple[str, ...],
    *,
    known: tuple[str, ...],
    eligible: tuple[str, ...],
    variant: str,
) -> None:
    def explain(pattern: str) -> str | None:
        return _why_not(model, pattern, known, variant)

    errors = []
    missed = [pattern for pattern, names in found.items() if not names]
    if missed:
        parts = last_parts(eligible)
        errors.append(
            unmatched_error(missed, parts, key="lora.targets", what="layers", explain=explain)
        )
    missed = [pattern for pattern in exclude if not any(matches(pattern, n) for n in known)]
    if missed:
        errors.append(unmatched_error(missed, last_parts(known), key="lora.exclude", what="layers"))
    if errors:
        raise UnmatchedTargetsError(
            [problem for error in errors for problem in error.problems],
            patterns=tuple(pattern for error in errors for pattern in error.patterns),
            known=last_parts(known),
        )


def _why_not(model: nn.Module, pattern: str, known: tuple[str, ...], variant: str) -> str | None:
    """Say why what a pattern matches gets no adapter; None where it matches nothing at all."""
    if any(matches(pattern, name) for name in known):
        return "matches only layers of modules that are trained whole, such as the head"
    found = [m for name, m in model.named_modules() if name and matches(pattern, name)]
    readers = {reader for name, reader in read_by_others(model).items() if matches(pattern, name)}
    if readers:
        return f"matches only weights that {', '.join(sorted(readers))} reads without calling them"
    able = [module for module in found if kind_of(module) is not None]
    names = ", ".join(sorted({type(module).__name__ for module in able or found})[:5])
    if able:
        return f"matches only {names}, which lora.variant={variant} cannot adapt"
    return f"matches only {names}, which cannot be adapted" if found else None


def _check_untied(model: nn.Module, names: Iterable[str]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    problems = []
    for name in names:
        weights = [weight for weight in model.get_submodule(name).parameters() if weight.ndim > 1]
        shared = [other for weight in weights for other in owners[id(weight)]]
        others = [other for other in shared if not is_inside(other, (name,))]
        if others:
            last = name.rpartition(".")[2]
            rows = ", or train rows of it with lora.trainable_tokens"
            is_rows = kind_of(model.get_submodule(name)) == "embedding"
            problems.append(
                Problem(
                    id="lora.tied-target",
                    message="`lora.targets` must name layers with a weight of their own, but "
                    f'"{name}" shares its weight with "{others[0]}", which would not follow.',
                    key="lora.targets",
                    fix=f'set "lora.exclude=[{last}]"{rows if is_rows else ""}.',
                )
            )
    if problems:
        raise UserError(problems)
