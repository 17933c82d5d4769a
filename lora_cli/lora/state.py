"""The trained tensors of a model by name: taken out, and put back strictly."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from lora_cli.errors import Problem, UserError
from lora_cli.lora.layer import AdapterLayer, SharedTensors


def adapter_state(model: nn.Module, saved_modules: Iterable[str]) -> dict[str, torch.Tensor]:
    """Copy what was trained: adapters with their frozen factors, saved modules with their buffers.

    Whatever else is trained, such as biases of the base, comes along under its own name.

    Args:
        model: A model with adapters.
        saved_modules: Exact paths of the modules that are trained whole.

    Returns:
        Contiguous CPU copies that share no memory, by names such as
        "bert.encoder.layer.0.attention.self.query.lora_A.weight" and "classifier.weight".
    """
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in live_tensors(model, saved_modules).items()
    }


def load_adapter_state(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    saved_modules: Iterable[str],
    *,
    where: str | None = None,
) -> None:
    """Copy `state` into the adapters and saved modules of a model, in place.

    Call it after `inject_lora` and `freeze_base`. Floating tensors are cast to the dtype in the
    model, which is float32. Nothing is copied if anything is wrong.

    Args:
        model: A model with adapters.
        state: Tensors by the names of `adapter_state`.
        saved_modules: Exact paths of the modules that are trained whole.
        where: File or folder of the state, for the message.

    Raises:
        UserError: If a tensor is missing, unexpected, of the wrong shape or kind, or not finite;
            every such tensor is listed.
    """
    live = live_tensors(model, saved_modules)
    shared = [name for name in live if name in state]
    faults = {
        "hold every tensor of the model's adapter, but lacks": [n for n in live if n not in state],
        "hold no tensor without a place in the model, but has": [n for n in state if n not in live],
        "fit the model in every shape, but differs in": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(live[name].shape)}"
            for name in shared
            if state[name].shape != live[name].shape
        ],
        "fit the model in every kind of number, but differs in": [
            f"{name} {state[name].dtype}"
            for name in shared
            if state[name].is_floating_point() != live[name].is_floating_point()
        ],
        "hold finite numbers only, but has NaN or infinity in": [
            name for name in shared if not bool(torch.isfinite(state[name]).all())
        ],
    }
    problems = [
        Problem(
            id="adapter.state",
            message=f"The adapter must {rule}: {', '.join(sorted(names))}.",
            where=where,
            fix="use an adapter that was trained on this base model, or copy it again.",
        )
        for rule, names in faults.items()
        if names
    ]
    if problems:
        raise UserError(problems)
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(state[name])


def live_tensors(model: nn.Module, saved_modules: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of `adapter_state` themselves, which training changes."""
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            tensors |= {f"{name}.{leaf}": value for leaf, value in module.own_tensors().items()}
        elif isinstance(module, SharedTensors):
            tensors |= {f"{name}.{leaf}": value for leaf, value in module.named_buffers()}
    for name in saved_modules:
        for leaf, tensor in model.get_submodule(name).state_dict().items():
            tensors[f"{name}.{leaf}"] = tensor
    others = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return {name: value for name, value in others.items() if name not in tensors} | tensors
