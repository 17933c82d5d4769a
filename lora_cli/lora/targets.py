"""Which linear layers get an adapter: names, globs and keywords to exact module paths."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from lora_cli.errors import Problem, UserError, nearest_name

MAX_PATTERN_LENGTH = 200

Targets = tuple[str, ...] | Literal["auto", "all-linear"]


@dataclass(frozen=True, slots=True)
class ResolvedTargets:
    """The layers to adapt.

    Attributes:
        names: Exact module paths, in the order of the model's modules.
        counts: For each target pattern the number of layers that it selects, before `exclude`.
    """

    names: tuple[str, ...]
    counts: dict[str, int]


class UnmatchedTargetsError(UserError):
    """Some patterns select nothing in the base model, which is still untouched.

    Attributes:
        patterns: The entries that matched nothing, in the order given.
        known: Last name parts of everything that could have been matched, sorted.
    """

    def __init__(
        self, problems: Sequence[Problem], *, patterns: tuple[str, ...], known: tuple[str, ...]
    ) -> None:
        super().__init__(problems)
        self.patterns = patterns
        self.known = known


def last_parts(names: Iterable[str]) -> tuple[str, ...]:
    """Return the last parts of dotted names, sorted, without repeats."""
    return tuple(sorted({name.rpartition(".")[2] for name in names}))


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a dotted name is one of `modules` or lies below one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern selects the module path `name`.

    A pattern is the last part or parts of a path ("query", "attention.self.query"), or a glob over
    the full path or over its last part ("*.layer.0.*", "q*"). Upper and lower case differ.
    """
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)


def check_patterns(patterns: Iterable[str], *, key: str) -> list[Problem]:
    """Return one problem for each entry that is empty or too long to be a pattern."""
    return [
        Problem(
            id="lora.bad-pattern",
            message=f"`{key}` must hold names of 1 to {MAX_PATTERN_LENGTH} characters, "
            f"but one entry has {len(pattern)}.",
            key=key,
        )
        for pattern in patterns
        if not 0 < len(pattern) <= MAX_PATTERN_LENGTH
    ]


def unmatched_error(
    patterns: Sequence[str],
    known: tuple[str, ...],
    *,
    key: str,
    what: str,
    explain: Callable[[str], str | None] = lambda _: None,
) -> UnmatchedTargetsError:
    """Build the error for patterns that match nothing, one problem each.

    Args:
        patterns: The patterns that matched nothing.
        known: Names that would have been accepted.
        key: Configuration key that held the patterns.
        what: Kind of thing to be named, such as "linear layers".
        explain: Gives the end of the sentence for a pattern, where there is more to say than that
            it matches none.
    """
    problems = []
    for pattern in patterns:
        near = nearest_name(pattern, known)
        problems.append(
            Problem(
                id="lora.unmatched-target",
                message=f"`{key}` must name {what} of the model, "
                f'but "{pattern}" {explain(pattern) or "matches none"}.',
                key=key,
                allowed=", ".join(known),
                fix=f'did you mean "{near}"?' if near else f"use names from the list in `{key}`.",
            )
        )
    return UnmatchedTargetsError(problems, patterns=tuple(patterns), known=known)


def linear_names(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of all linear layers that can be replaced, in module order.

    The output projection of `nn.MultiheadAttention` is left out: its weight is read, the layer is
    never called, so an adapter there would do nothing.
    """
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    )


def match_targets(
    model: nn.Module,
    *,
    targets: tuple[str, ...] | Literal["all-linear"],
    exclude: tuple[str, ...] = (),
    saved_modules: tuple[str, ...],
) -> tuple[str, ...]:
    """Select the layers of an adapter that was trained elsewhere.

    Unlike in a recipe, an entry that matches nothing is harmless here: the adapter's tensors are
    then checked against the selected layers, strictly in both directions.

    Returns:
        Exact module paths in module order; possibly none.
    """
    return tuple(
        name
        for name in _eligible(model, saved_modules, all_linear=targets == "all-linear")
        if (targets == "all-linear" or any(matches(pattern, name) for pattern in targets))
        and not any(matches(pattern, name) for pattern in exclude)
    )


def resolve_targets(
    model: nn.Module,
    *,
    targets: Targets,
    exclude: tuple[str, ...],
    auto: tuple[str, ...] | None,
    saved_modules: tuple[str, ...],
) -> ResolvedTargets:
    """Turn `lora.targets` and `lora.exclude` into exact module paths.

    Reads names only: works on the meta device and changes nothing.

    Args:
        model: The base model, before injection.
        targets: Patterns (see `matches`); "auto" for those of the family; "all-linear" for every
            linear layer but the output embedding.
        exclude: Patterns of layers to leave out.
        auto: The family's usual patterns, or None for a family that is not known.
        saved_modules: Modules that are trained whole; nothing inside them is selected.

    Raises:
        UnmatchedTargetsError: If a pattern matches no linear layer; all such patterns are listed.
        UserError: If `targets` is "auto" for an unknown family, no layer is left, a pattern is
            empty or too long, or a selected layer shares its weight with another one.
    """
    linear = linear_names(model)
    patterns = _patterns(targets, auto, last_parts(linear))
    problems = check_patterns(patterns, key="lora.targets")
    problems += check_patterns(exclude, key="lora.exclude")
    if problems:
        raise UserError(problems)
    all_linear = targets == "all-linear"
    eligible = _eligible(model, saved_modules, all_linear=all_linear)
    counts = {pattern: sum(matches(pattern, name) for name in eligible) for pattern in patterns}
    if all_linear:
        counts = {"all-linear": len(eligible)}
    _check_matched(counts, exclude, linear=linear, eligible=eligible)
    names = match_targets(
        model,
        targets="all-linear" if all_linear else patterns,
        exclude=exclude,
        saved_modules=saved_modules,
    )
    if not names:
        raise UserError(
            Problem(
                id="lora.nothing-to-adapt",
                message="`lora.exclude` must leave at least one layer of `lora.targets`, "
                "but leaves none.",
                key="lora.exclude" if exclude else "lora.targets",
                allowed=", ".join(last_parts(eligible)) or None,
            )
        )
    _check_untied(model, names)
    return ResolvedTargets(names=names, counts=counts)


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
    model: nn.Module, saved_modules: tuple[str, ...], *, all_linear: bool
) -> tuple[str, ...]:
    """Linear layers outside of saved modules; with `all_linear`, no output embedding either."""
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if all_linear and get_output is not None else None
    modules = dict(model.named_modules())
    return tuple(
        name
        for name in linear_names(model)
        if not is_inside(name, saved_modules) and (output is None or modules[name] is not output)
    )


def _check_matched(
    counts: dict[str, int],
    exclude: tuple[str, ...],
    *,
    linear: tuple[str, ...],
    eligible: tuple[str, ...],
) -> None:
    def explain(pattern: str) -> str | None:
        if any(matches(pattern, name) for name in linear):
            return "matches only layers of modules that are trained whole, such as the head"
        return None

    errors = []
    missed = [pattern for pattern, count in counts.items() if not count]
    if missed:
        known = last_parts(eligible)
        errors.append(
            unmatched_error(
                missed, known, key="lora.targets", what="linear layers", explain=explain
            )
        )
    missed = [p for p in exclude if not any(matches(p, name) for name in linear)]
    if missed:
        known = last_parts(linear)
        errors.append(unmatched_error(missed, known, key="lora.exclude", what="linear layers"))
    if errors:
        raise UnmatchedTargetsError(
            [problem for error in errors for problem in error.problems],
            patterns=tuple(pattern for error in errors for pattern in error.patterns),
            known=last_parts(linear),
        )


def _check_untied(model: nn.Module, names: tuple[str, ...]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    modules = dict(model.named_modules())
    tied = [name for name in names if len(owners[id(modules[name].weight)]) > 1]
    if tied:
        raise UserError(
            [
                Problem(
                    id="lora.tied-target",
                    message="`lora.targets` must name layers with a weight of their own, but "
                    f'"{name}" shares its weight with another layer.',
                    key="lora.targets",
                    fix=f'set "lora.exclude=[{name.rpartition(".")[2]}]".',
                )
                for name in tied
            ]
        )
