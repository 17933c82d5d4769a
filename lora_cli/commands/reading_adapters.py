"""An adapter of any program, read as one of PEFT, and compared with its base; for convert."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lora_cli.artifacts.adapter import RECORD, AdapterRecord, Subject, load_adapter
from lora_cli.artifacts.foreign_file import Base, ForeignFile, read_foreign
from lora_cli.artifacts.foreign_formats import Format, detect_format
from lora_cli.artifacts.foreign_shapes import base_layers, check_layers
from lora_cli.artifacts.peft_config import CONFIG_FILE
from lora_cli.artifacts.peft_format import PeftAdapter, load_peft
from lora_cli.artifacts.peft_layers import adapter_layers, settings_of
from lora_cli.commands.locating import about, check_base_weights
from lora_cli.config.conversion import ConvertConfig
from lora_cli.errors import Problem, UserError
from lora_cli.lora.factors import Factors, factor_state
from lora_cli.lora.settings import LoraSettings
from lora_cli.models.architecture import load_architecture, resolve_config
from lora_cli.models.base import load_config
from lora_cli.models.sources import resolve_model
from lora_cli.tasks.stored_head import find_head
from lora_cli.tasks.table import FAMILIES


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadAdapter:
    """What was read.

    Attributes:
        format: Name of the program whose format it is in.
        path: The file of tensors.
        adapter: As PEFT has it.
        layers: Its updates by layer; empty where it has no factors A and B of plain layers.
        module_names: Paths of all modules of the base; empty where that was not given.
        record: What lora-cli knows of it; None where another program wrote it.
        notes: What a person should know, in sentences.
    """

    format: str
    path: Path
    adapter: PeftAdapter
    layers: Mapping[str, Factors]
    module_names: tuple[str, ...] = ()
    record: AdapterRecord | None = None
    notes: tuple[str, ...] = ()


def find_adapter(path: str) -> Path:
    """Return the folder or file of an adapter, given that or the run directory that it is in."""
    folder = Path(path)
    inner = folder / "adapter"
    return inner if not (folder / CONFIG_FILE).is_file() and inner.is_dir() else folder


def read_adapter(path: Path, config: ConvertConfig) -> ReadAdapter:
    """Read an adapter of any format.

    Args:
        path: What `find_adapter` returned.
        config: Its base and alpha.

    Raises:
        UserError: If it is of no known format, is not whole, needs a base or a strength that is
            not given or does not need the one that is, or does not fit the base.
    """
    file = read_foreign(path)
    form = detect_format(file)
    if config.alpha is not None and form.states_scale:
        raise UserError(_states_scale(form, file))
    if form.read is None:
        return _read_peft(file, form, config)
    model, base = _open_base(config.base, task_type=None)
    found = form.read(file, base=base, alpha=config.alpha)
    if base is None and found.base_name is None:
        raise UserError(_no_base(file))
    check_layers(found.layers, base, where=str(file.path))
    settings = settings_of(found.layers, LoraSettings(r=1, alpha=1.0))
    adapter = PeftAdapter(
        settings=settings,
        targets=tuple(found.layers),
        saved_modules=(),
        # mlx-lm alone names its base, and trains language models.
        task_type="CAUSAL_LM" if model is None else _task_type(model.config),
        base_name=config.base or found.base_name,
        revision=None,
        state=factor_state(found.layers),
    )
    return ReadAdapter(
        format=form.name,
        path=file.path,
        adapter=_with_model(adapter, model, base),
        layers=found.layers,
        module_names=() if model is None else tuple(name for name, _ in model.named_modules()),
        notes=found.notes,
    )


def _read_peft(file: ForeignFile, form: Format, config: ConvertConfig) -> ReadAdapter:
    folder = file.path.parent
    record = None
    if (folder / RECORD).is_file():
        adapter, record = load_adapter(folder)
        if not isinstance(adapter, PeftAdapter):
            raise TypeError(f"{folder} holds tensors of PEFT, but was read as another kind.")
        if config.base is not None:
            with about("base"):
                source = resolve_model(config.base, processor=None)
            check_base_weights(source, record, Subject(adapter=folder, run=None))
    else:
        adapter = load_peft(folder)
    if config.base is None and adapter.base_name is None:
        raise UserError(_no_base(file))
    model, base = _open_base(config.base, task_type=adapter.task_type)
    layers = adapter_layers(adapter, where=str(file.path))
    # Those within the layers of others have no shape of their own in the base.
    outer = {name: factors for name, factors in layers.items() if ".base_layer" not in name}
    check_layers(outer, base, where=str(file.path))
    # PEFT writes, and `load_peft` does not read, what its own automatic loading goes by.
    mapping = (file.config or {}).get("auto_mapping") or {}
    if mapping.get("base_model_class") and mapping.get("parent_library"):
        name = f"{mapping['parent_library']}.{mapping['base_model_class']}"
        adapter = replace(adapter, model_class=name)
    adapter = replace(adapter, fan_in_fan_out=bool((file.config or {}).get("fan_in_fan_out")))
    if record is None and config.base is not None:
        revision = adapter.revision if config.base == adapter.base_name else None
        adapter = replace(adapter, base_name=config.base, revision=revision)
    return ReadAdapter(
        format=form.name if record is None else "lora-cli",
        path=file.path,
        adapter=_with_model(adapter, model, base),
        layers=layers,
        module_names=() if model is None else tuple(name for name, _ in model.named_modules()),
        record=record,
    )


def _open_base(path: str | None, *, task_type: str | None) -> tuple[Any, Base | None]:
    """Build the base without its numbers, with the head of a kind of task or else its own."""
    if path is None:
        return None, None
    with about("base"):
        source = resolve_config(path)
        settings = load_config(source)
        own = find_head(settings) or ("AutoModel", None)
        wanted = [f.auto_class for f in FAMILIES.values() if task_type and f.task_type == task_type]
        auto_class = own[0] if own[1] == task_type or not wanted else wanted[0]
        model: nn.Module = load_architecture(source, auto_class=auto_class, options={}).model
    plain = json.loads(settings.to_json_string(use_diff=False))
    return model, Base(name=path, layers=base_layers(model), settings=plain)


def _task_type(settings: Any) -> str | None:
    head = find_head(settings)
    return None if head is None else head[1]


def _with_model(adapter: PeftAdapter, model: Any, base: Base | None) -> PeftAdapter:
    """Return an adapter with what the class of its base says of it."""
    if model is None or base is None:
        return adapter
    kinds = {
        layer.kind
        for name, layer in base.layers.items()
        if f"{name}.lora_A.weight" in adapter.state
    }
    return replace(
        adapter,
        model_class=f"{type(model).__module__}.{type(model).__name__}",
        fan_in_fan_out="conv1d" in kinds,
    )


def _states_scale(form: Format, file: ForeignFile) -> Problem:
    return Problem(
        id="convert.scale-twice",
        message=f"`alpha` must be left out, since an adapter of {form.name} states its strength, "
        "but is given.",
        key="alpha",
        where=str(file.path),
        fix="leave alpha out",
    )


def _no_base(file: ForeignFile) -> Problem:
    return Problem(
        id="convert.no-base",
        message="`base` must name the model, since the adapter does not, but is null.",
        key="base",
        where=str(file.path),
        fix="base=DIR",
    )
