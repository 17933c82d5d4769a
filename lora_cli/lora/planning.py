"""Everything that an adapter is to reach in a model, decided before anything is touched."""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from lora_cli.config.adapters import LoraConfig
from lora_cli.errors import Problem, UserError
from lora_cli.lora.blocks import block_of, check_blocks, stack_depths
from lora_cli.lora.experts import inject_experts, match_parameters, resolve_parameters
from lora_cli.lora.inject import freeze_base, inject_lora, saved_modules
from lora_cli.lora.patterns import last_parts, matches
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.targets import ResolvedTargets, layer_names, resolve_targets
from lora_cli.lora.tokens import check_tokens, put_tokens
from lora_cli.lora.unmatched import check_patterns, unmatched_error

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterPlan:
    """What an adapter reaches.

    Attributes:
        targets: Layers that get an adapter.
        saved: Paths of the modules that are trained and saved whole.
        parameters: Names of the fused weights that get an adapter.
        short_parameters: Last parts of these names where they mean the same, else the names.
    """

    targets: ResolvedTargets
    saved: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    short_parameters: tuple[str, ...] = ()


def plan_adapter(
    model: Any,
    config: LoraConfig,
    *,
    new_keys: Iterable[str],
    auto: tuple[str, ...] | None,
    source: str,
) -> AdapterPlan:
    """Find out what a configuration means in a model, and report everything that it lacks.

    Reads names and shapes only: works on the meta device and changes nothing.

    Args:
        model: The base model, before injection.
        config: What is asked for.
        new_keys: Names of parameters that the base weights do not provide.
        auto: The usual targets of the model's family, or None where they are not known.
        source: The model as the user named it, for the advice.

    Raises:
        UserError: With every entry of targets, exclude, layers, modules_to_save, rank_pattern,
            alpha_pattern and target_parameters that matches nothing, and whatever else is wrong.
    """
    problems: list[Problem] = []
    new = tuple(new_keys)

    def attempt(step: Callable[[], Result]) -> Result | None:
        try:
            return step()
        except UserError as error:
            problems.extend(error.problems)
            return None

    saved = attempt(lambda: saved_modules(model, new, config.modules_to_save))
    if saved is None:
        # Where this fails too, there is no model to speak of.
        saved = saved_modules(model, new, ())
    targets = attempt(lambda: _resolve(model, config, auto=auto, saved=saved))
    adapted = () if targets is None else targets.names
    parameters = attempt(lambda: _parameters(model, config, saved=saved, adapted=adapted))
    known = (*adapted, *(parameters or ()))
    if targets is None or parameters is None:
        known = layer_names(model, config.variant)
    problems += _check_ranks("lora.rank_pattern", config.rank_pattern, known, model)
    problems += _check_ranks("lora.alpha_pattern", config.alpha_pattern, known, model)
    if config.lora_bias:
        problems += _check_biases(model, adapted)
    if config.trainable_tokens:
        problems += check_tokens(model, adapted, saved)
    if problems or targets is None or parameters is None:
        raise UserError([_with_command(problem, source) for problem in problems])
    short = tuple(sorted({".".join(name.split(".")[-2:]) for name in parameters}))
    same = match_parameters(model, short, saved_modules=saved) == parameters
    return AdapterPlan(
        targets=targets,
        saved=saved,
        parameters=parameters,
        short_parameters=short if same else parameters,
    )


def put_adapter(
    model: nn.Module,
    plan: AdapterPlan,
    settings: LoraSettings,
    *,
    tokens: Mapping[str, Sequence[int]],
) -> None:
    """Put in everything that a plan names, and freeze the rest, in place.

    Args:
        model: The base model that the plan was made for.
        plan: What gets an adapter.
        settings: Variant, ranks and strengths.
        tokens: Numbers of tokens to train the rows of, by path of the embedding.

    Raises:
        UserError: If the variant cannot adapt one of the layers; nothing is changed then.
    """
    inject_lora(model, plan.targets.names, settings)
    inject_experts(model, plan.parameters, settings)
    put_tokens(model, tokens)
    freeze_base(model, plan.saved, bias=settings.bias)


def _resolve(
    model: Any, config: LoraConfig, *, auto: tuple[str, ...] | None, saved: tuple[str, ...]
) -> ResolvedTargets:
    if not config.targets and config.target_parameters:
        if config.exclude:
            raise UserError(
                Problem(
                    id="lora.nothing-to-exclude",
                    message="`lora.exclude` must leave layers of `lora.targets` out, but these are "
                    "none.",
                    key="lora.exclude",
                    fix="leave it out: `lora.target_parameters` names what it means",
                )
            )
        return ResolvedTargets((), {})
    return resolve_targets(
        model,
        targets=config.targets,
        exclude=config.exclude,
        auto=auto,
        saved_modules=saved,
        variant=config.variant,
        layers=config.layers,
    )


def _parameters(
    model: Any, config: LoraConfig, *, saved: tuple[str, ...], adapted: Sequence[str]
) -> tuple[str, ...]:
    if not config.target_parameters:
        return ()
    if config.layers is not None and not config.targets:
        names = resolve_parameters(model, config.target_parameters, saved_modules=saved)
        depths = stack_depths(name for name, _ in model.named_parameters(remove_duplicate=False))
        stacks = {block.stack for block in map(block_of, names) if block is not None}
        problems = check_blocks(config.layers, {stack: depths[stack] for stack in sorted(stacks)})
        if problems:
            raise UserError(problems)
    return resolve_parameters(
        model,
        config.target_parameters,
        saved_modules=saved,
        adapted=adapted,
        layers=config.layers,
    )


def _check_biases(model: nn.Module, names: Sequence[str]) -> list[Problem]:
    """Refuse a bias in B where the layer has none: the merged model would have no place for it."""
    bare = [name for name in names if getattr(model.get_submodule(name), "bias", None) is None]
    if not bare:
        return []
    return [
        Problem(
            id="lora.no-bias",
            message="`lora.lora_bias` must be false where layers have no bias to merge it into, "
            f"but these have none: {', '.join(last_parts(bare))}.",
            key="lora.lora_bias",
            fix="lora.lora_bias=false, or leave these layers out",
        )
    ]


def _check_ranks(
    key: str, patterns: Mapping[str, float], known: Sequence[str], model: nn.Module
) -> list[Problem]:
    """Return a problem for each pattern that selects no layer with an adapter."""
    bad = check_patterns(patterns, key=key)
    if bad:
        return bad
    missed = [p for p in patterns if not any(matches(p, name) for name in known)]
    if not missed:
        return _check_order(key, patterns, known)
    everything = [name for name, _ in model.named_modules() if name]

    def explain(pattern: str) -> str | None:
        if any(matches(pattern, name) for name in everything):
            return "matches only what gets no adapter"
        return None

    error = unmatched_error(
        missed, last_parts(known), key=key, what="adapted layers", explain=explain
    )
    return list(error.problems)


def _check_order(key: str, patterns: Iterable[str], known: Sequence[str]) -> list[Problem]:
    """Return a problem for each pattern that earlier ones leave nothing to: the first counts."""
    problems, seen = [], list[str]()
    for pattern in patterns:
        names = [name for name in known if matches(pattern, name)]
        before = [p for p in seen if any(matches(p, name) for name in names)]
        if all(any(matches(p, name) for p in before) for name in names):
            problems.append(
                Problem(
                    id="lora.shadowed-pattern",
                    message=f"Each entry of `{key}` must decide about a layer, but every layer of "
                    f'"{pattern}" is one of {_quoted(before)} as well, and the first entry counts.',
                    key=key,
                    fix=f'put "{pattern}" first, or leave it out',
                )
            )
        seen.append(pattern)
    return problems


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _with_command(problem: Problem, source: str) -> Problem:
    """Say how to list what there is, where a name was not found."""
    if problem.id != "lora.unmatched-target" or problem.key not in ("lora.targets", "lora.exclude"):
        return problem
    command = f"lora-cli targets {shlex.quote(f'model.path={source}')}"
    return replace(problem, fix=f"{problem.fix} List all: {command}")
