"""Put adapters into a model, and decide what of it is trained."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lora_cli.errors import Problem, UserError
from lora_cli.lora.build import build_layer
from lora_cli.lora.layer import AdapterLayer
from lora_cli.lora.patterns import is_inside, last_parts, matches
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.unmatched import check_patterns, unmatched_error
from lora_cli.lora.vera import share_factors

# Containers are never called themselves, so a hook on one would never run.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def inject_lora(model: nn.Module, names: Iterable[str], settings: LoraSettings) -> None:
    """Put an adapter around layers, in place.

    A starts from torch's global generator, layer by layer in the order of `names`: the same seed
    and names give the same adapter.

    Args:
        model: The base model.
        names: Exact paths of the layers.
        settings: Variant, ranks and strengths.

    Raises:
        UserError: If the variant cannot adapt one of the layers; nothing is changed then.
    """
    layers = {name: build_layer(model.get_submodule(name), name, settings) for name in names}
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    share_factors(model, list(layers.values()), settings)


def freeze_base(model: nn.Module, saved_modules: tuple[str, ...], *, bias: str = "none") -> None:
    """Freeze everything but the adapters and the modules that are trained whole, in place.

    Saved modules become float32. On a base of lower precision their inputs are cast to float32,
    and their outputs back to the dtype of the input where a frozen layer follows that expects it;
    a head at the end of the model returns float32.

    Args:
        model: The base with adapters in place.
        saved_modules: Exact paths of the modules that are trained whole.
        bias: Which biases of the base are trained: "none", those of adapted layers ("lora_only"),
            or "all".

    Raises:
        UserError: If biases are to be trained whose number format is too coarse for that.
    """
    model.requires_grad_(False)
    _unfreeze_biases(model, bias)
    for module in model.modules():
        if isinstance(module, AdapterLayer):
            for parameter in module.trained_parameters():
                parameter.requires_grad_(True)
    # A tied weight is there at every place where it is used: scores of tokens follow the head.
    every = dict(model.named_parameters(remove_duplicate=False))
    order = {name: index for index, name in enumerate(every)}
    low = {
        name
        for name, parameter in every.items()
        if parameter.is_floating_point() and parameter.dtype.itemsize < torch.float32.itemsize
    }
    last_frozen_low = max(
        (order[name] for name in low if not is_inside(name, saved_modules)), default=-1
    )
    for saved in saved_modules:
        module = model.get_submodule(saved)
        own = [name for name in order if is_inside(name, (saved,))]
        if low.intersection(own):
            module.float()
            module.register_forward_pre_hook(_widen_inputs, with_kwargs=True)
            if max(order[name] for name in own) < last_frozen_low:
                dtype = _narrow_dtype(model)
                module.register_forward_hook(lambda _m, _i, output, d=dtype: _cast(output, d))
        module.requires_grad_(True)


def _unfreeze_biases(model: nn.Module, bias: str) -> None:
    if bias == "none":
        return
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    chosen = [layer.base_layer for layer in layers] if bias == "lora_only" else model.modules()
    for module in chosen:
        parameter = getattr(module, "bias", None)
        if not isinstance(parameter, nn.Parameter):
            continue
        if parameter.dtype.itemsize < torch.float32.itemsize:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise UserError(
                Problem(
                    id="lora.coarse-bias",
                    message="`lora.bias` must be none on a base below float32, whose biases cannot "
                    f"take small steps, but is {bias} on {kind}.",
                    key="lora.bias",
                    fix="model.dtype=float32, or lora.bias=none",
                )
            )
        parameter.requires_grad_(True)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what the optimizer updates, by the names of `lora_cli.lora.state.adapter_state`."""
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def saved_modules(
    model: nn.Module, missing_keys: Iterable[str], extra: tuple[str, ...]
) -> tuple[str, ...]:
    """Decide which modules are trained and saved whole: the new ones, and those the user names.

    Every parameter that the base weights did not provide is covered: it is collapsed to the
    highest module in which all parameters are new (a head, a pooler), or, where a module has both
    kinds, to the module that holds it.

    A module never comes along because of a bias beside a weight that is tied to one which the base
    provides, as the scores of tokens are to their embeddings: that would train the embeddings, or
    save them twice. Such a bias starts at 0, and stays there.

    Args:
        model: The base model, before injection.
        missing_keys: Names that `from_pretrained` reported as newly initialised; those of buffers
            are ignored.
        extra: Patterns of `lora.modules_to_save`, matched as those of `lora.targets` are, but
            against modules of any kind that have parameters.

    Returns:
        Exact module paths in module order, none inside another.

    Raises:
        UnmatchedTargetsError: If entries of `extra` match no module.
        UserError: If the base weights provide nothing, or a new parameter belongs to no module
            but the whole model, or only to one with tied weights.
    """
    parameters = [name for name, _ in model.named_parameters()]
    every = dict(model.named_parameters(remove_duplicate=False))
    new = set(missing_keys).intersection(every)
    prefix = getattr(model, "base_model_prefix", "")
    core = [name for name in parameters if name.startswith(f"{prefix}.")] or parameters
    if new.issuperset(core):
        raise UserError(
            Problem(
                id="model.no-weights",
                message="`model.path` must hold weights of this kind of model, "
                f"but all {len(core)} tensors of the base are missing.",
                key="model.path",
            )
        )
    tied = _tied_to_old(every, new)
    new -= tied
    chosen = {
        _highest_new(model, name, list(every), new, tied)
        for name in new
        if not _stays_zero(name, every[name], tied)
    }
    chosen.update(_named_modules(model, parameters, extra))
    outermost = [name for name in chosen if not is_inside(name.rpartition(".")[0], chosen - {name})]
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return tuple(sorted(outermost, key=order.__getitem__))


def _tied_to_old(parameters: Mapping[str, nn.Parameter], new: set[str]) -> set[str]:
    """Return the names of parameters that share a tensor with another which the base provides."""
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    return {
        name
        for shared in names.values()
        if len(shared) > 1 and not new.issuperset(shared)
        for name in shared
    }


def _stays_zero(name: str, parameter: nn.Parameter, tied: set[str]) -> bool:
    """Whether a new parameter is a bias of 0 in a module that holds tied weights as well."""
    module = name.rpartition(".")[0]
    beside = any(is_inside(other, (module,)) for other in tied)
    return beside and parameter.ndim == 1 and (parameter.is_meta or not bool(parameter.any()))


def _highest_new(
    model: nn.Module, name: str, parameters: list[str], new: set[str], tied: set[str]
) -> str:
    module = name.rpartition(".")[0]
    is_container = isinstance(model.get_submodule(module), _CONTAINERS)
    if not module or is_container or any(is_inside(other, (module,)) for other in tied):
        raise UserError(
            Problem(
                id="model.lone-parameter",
                message=f"Every new parameter must belong to a module that can be trained whole, "
                f'but "{name}" belongs to none.',
                key="model.path",
                fix="use base weights that provide it.",
            )
        )
    above = module.rpartition(".")[0]
    while above and all(other in new for other in parameters if other.startswith(f"{above}.")):
        if not isinstance(model.get_submodule(above), _CONTAINERS):
            module = above
        above = above.rpartition(".")[0]
    return module


def _named_modules(model: nn.Module, parameters: list[str], extra: tuple[str, ...]) -> set[str]:
    key = "lora.modules_to_save"
    problems = check_patterns(extra, key=key)
    if problems:
        raise UserError(problems)
    with_parameters = {
        name.rsplit(".", depth)[0] for name in parameters for depth in range(1, name.count(".") + 1)
    }
    candidates = [
        name
        for name, module in model.named_modules()
        if name in with_parameters and not isinstance(module, _CONTAINERS)
    ]
    found = {pattern: [n for n in candidates if matches(pattern, n)] for pattern in extra}
    missed = [pattern for pattern, names in found.items() if not names]
    if missed:
        raise unmatched_error(missed, last_parts(candidates), key=key, what="modules")
    return {name for names in found.values() for name in names}


def _narrow_dtype(model: nn.Module) -> torch.dtype:
    return next(
        parameter.dtype
        for parameter in model.parameters()
        if not parameter.requires_grad
        and parameter.is_floating_point()
        and parameter.dtype.itemsize < torch.float32.itemsize
    )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast the floating tensors of a value, in plain tuples and lists too."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_cast(item, dtype) for item in value)
    if isinstance(value, list):
        return [_cast(item, dtype) for item in value]
    return value


def _widen_inputs(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    wide = {name: _cast(value, torch.float32) for name, value in kwargs.items()}
    return _cast(args, torch.float32), wide
