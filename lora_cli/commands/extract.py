"""`lora-cli extract`: the difference of two checkpoints as an adapter, in the format of PEFT."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_cli.artifacts.commit import commit_folder
from lora_cli.artifacts.merged import check_output
from lora_cli.artifacts.peft_format import PeftAdapter, peft_files
from lora_cli.artifacts.room import make_room
from lora_cli.commands.display import Display
from lora_cli.commands.locating import about
from lora_cli.commands.options import Options
from lora_cli.config.composed import Composed
from lora_cli.config.extraction import ExtractConfig
from lora_cli.errors import Problem, UserError
from lora_cli.lora.extraction import Extracted, extract_update
from lora_cli.lora.factors import Factors, factor_state
from lora_cli.lora.kinds import dense_weight, is_conv1d, is_linear, is_quantized
from lora_cli.lora.patterns import is_inside
from lora_cli.lora.settings import LoraSettings
from lora_cli.models.base import BaseModel, load_base, load_config
from lora_cli.models.sources import ModelSource, resolve_model
from lora_cli.tasks.stored_head import find_head
from lora_cli.tasks.table import FAMILIES


@dataclass(kw_only=True, slots=True)
class Difference:
    """How two checkpoints differ.

    Attributes:
        layers: Updates of linear layers, by path.
        saved: Modules that the base does not have, or in another size, by path: kept whole.
        left_out: Squared length of what else differs, by name of the tensor.
    """

    layers: dict[str, Extracted] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    left_out: dict[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the energy of the whole difference that the updates have."""
        whole = sum(layer.whole for layer in self.layers.values()) + sum(self.left_out.values())
        return sum(layer.kept for layer in self.layers.values()) / whole if whole else 1.0


def run(composed: Composed, options: Options, display: Display) -> int:
    """Compare the checkpoints, write the adapter, and return the exit code."""
    config: ExtractConfig = composed.config
    with about("base"):
        source = resolve_model(config.base or "", processor=None)
    with about("tuned"):
        tuned_source = resolve_model(config.tuned or "", processor=None)
    output = Path(config.output or "")
    inputs = [source.folder, tuned_source.folder]
    check_output(output, key="output", overwrite=options.overwrite, inputs=inputs)
    base, tuned, task_type = _load(source, tuned_source)
    found = _compare(base, tuned, r=config.lora.r, display=display)
    if not found.layers:
        raise UserError(_nothing_to_extract(found))
    adapter = _as_adapter(found, base.model, tuned, config.lora.r, source, task_type)
    files = peft_files(adapter, module_names=[name for name, _ in base.model.named_modules()])
    make_room(output)
    commit_folder(output, files, facts={}, manifest=False)
    size = sum(map(len, files.values()))
    _show(found, display)
    display.note(f"adapter: {output} ({size / 1e6:.2f} MB)")
    display.result(
        {
            "output": str(output),
            "bytes": size,
            "energy": found.share,
            "layers": {
                name: {"r": layer.A.shape[0], "energy": layer.kept / layer.whole}
                for name, layer in found.layers.items()
            },
            "saved_modules": found.saved,
            "left_out": sorted(found.left_out),
        }
    )
    return 0


def _load(source: ModelSource, tuned: ModelSource) -> tuple[BaseModel, nn.Module, str | None]:
    """Load both checkpoints with the head that the tuned one has.

    Raises:
        UserError: If one cannot be loaded, the tuned one is not whole, or they are of different
            architectures.
    """
    with about("tuned"):
        settings = load_config(tuned)
    with about("base"):
        of_base = load_config(source)
    if settings.model_type != of_base.model_type:
        raise UserError(_unlike(f"one is {of_base.model_type}, the other {settings.model_type}"))
    auto_class, task_type = _head(settings)
    with about("tuned"):
        loaded = load_base(tuned, auto_class=auto_class, options={}, dtype="auto", seed=0)
    if loaded.new_keys:
        raise UserError(_unlike(f"the tuned one lacks {loaded.new_keys[0]}"))
    # The names of the labels may differ: no output changes its meaning, all are written.
    options = {"num_labels": settings.num_labels}
    with about("base"):
        base = load_base(source, auto_class=auto_class, options=options, dtype="auto", seed=0)
    mine, other = base.model.state_dict(), loaded.model.state_dict()
    for name, tensor in other.items():
        if name not in mine or mine[name].shape != tensor.shape:
            raise UserError(_unlike(f"{name} is in one of them alone, or has another shape"))
    return base, loaded.model, task_type


def _head(config: Any) -> tuple[str, str | None]:
    """Return the Auto class that loads a model's own class, and PEFT's name for its task.

    Raises:
        UserError: If it has a head of no task family, which would be left out without a word.
    """
    if (head := find_head(config)) is not None:
        return head
    names = config.architectures or ()
    raise UserError(
        Problem(
            id="extract.unknown-head",
            message="`tuned` must be a body, or have the head of a task family, but its "
            f"config.json says {', '.join(names) or 'nothing of it'}.",
            key="tuned",
            allowed=", ".join(FAMILIES),
        )
    )


def _compare(base: BaseModel, tuned: nn.Module, *, r: int, display: Display) -> Difference:
    """Extract the update of every linear layer that differs, and note what else does."""
    found, covered = Difference(), set[str]()
    found.saved = _outermost(name.rpartition(".")[0] for name in base.new_keys)
    others = dict(tuned.named_modules())
    tied = _tied(base.model)
    layers = [
        (name, module)
        for name, module in base.model.named_modules()
        if is_linear(module) and not is_inside(name, found.saved)
    ]
    for name, module in display.track("layers", layers):
        if is_quantized(module) or is_quantized(others[name]):
            raise UserError(_unlike(f"{name} is quantized"))
        if f"{name}.weight" in tied:
            continue
        before, after = dense_weight(module), dense_weight(others[name])
        covered.add(f"{name}.weight")
        if not torch.equal(before, after):
            found.layers[name] = extract_update(before, after, r)
    mine = _own_tensors(base.model)
    for name, tensor in _own_tensors(tuned).items():
        if name not in covered and not is_inside(name, found.saved):
            change = float((tensor.float() - mine[name].float()).square().sum())
            if change:
                found.left_out[name] = change
    return found


def _own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return weights and statistics of a model that its file has, shared ones once."""
    stored = model.state_dict()
    owned = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in owned if name in stored}


def _tied(model: nn.Module) -> set[str]:
    """Return the names of the weights that several modules share: no update is one module's."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return {name for shared in names.values() if len(shared) > 1 for name in shared}


def _outermost(names: Iterable[str]) -> list[str]:
    """Return the modules that are in none of the others; the model itself is none."""
    found: list[str] = []
    for name in sorted(set(names) - {""}):
        if not is_inside(name, found):
            found.append(name)
    return found


def _as_adapter(
    found: Difference,
    base: nn.Module,
    tuned: nn.Module,
    r: int,
    source: ModelSource,
    task_type: str | None,
) -> PeftAdapter:
    factors = {
        name: Factors(A=layer.A, B=layer.B, scale=1.0) for name, layer in found.layers.items()
    }
    ranks = {name: layer.A.shape[0] for name, layer in found.layers.items()}
    smaller = {name: rank for name, rank in ranks.items() if rank != r}
    saved: Mapping[str, torch.Tensor] = {
        name: tensor.detach().clone()
        for name, tensor in tuned.state_dict().items()
        if is_inside(name, found.saved)
    }
    return PeftAdapter(
        settings=LoraSettings(
            r=r,
            alpha=float(r),
            rank_pattern=smaller,
            alpha_pattern={name: float(rank) for name, rank in smaller.items()},
        ),
        targets=tuple(found.layers),
        saved_modules=tuple(found.saved),
        task_type=task_type,
        base_name=source.name,
        revision=source.revision,
        state={**factor_state(factors), **saved},
        model_class=f"{type(base).__module__}.{type(base).__name__}",
        fan_in_fan_out=any(is_conv1d(base.get_submodule(name)) for name in found.layers),
    )


def _show(found: Difference, display: Display) -> None:
    """Show the energy of each layer, and what is in no layer."""
    rows = [
        [name, str(layer.A.shape[0]), f"{100 * layer.kept / layer.whole:.2f} %"]
        for name, layer in found.layers.items()
    ]
    display.table("energy kept", ["layer", "r", "energy"], rows)
    if found.saved:
        display.note(f"kept whole, since the base has none of that size: {', '.join(found.saved)}")
    if found.left_out:
        few = ", ".join(list(found.left_out)[:5])
        more = len(found.left_out) - 5
        display.note(
            f"left out, since they are no linear layers of their own: {few}"
            + (f" and {more} more" if more > 0 else "")
        )
    display.note(f"energy of the whole difference that is kept: {100 * found.share:.2f} %")


def _unlike(why: str) -> Problem:
    return Problem(
        id="extract.unlike",
        message=f"`tuned` must be a checkpoint of the same model as `base`, but {why}.",
        key="tuned",
        fix="give the folder that was trained, and the one that it was trained from",
    )


def _nothing_to_extract(found: Difference) -> Problem:
    other = f"only {len(found.left_out)} other tensors do" if found.left_out else "nothing does"
    return Problem(
        id="extract.nothing",
        message=f"`tuned` must differ from `base` in a linear layer, but {other}.",
        key="tuned",
    )
