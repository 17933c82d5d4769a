"""`lora-cli convert`: an adapter from elsewhere in the format of PEFT, or one in another rank."""

from collections.abc import Mapping
from pathlib import Path

from lora_cli.artifacts.commit import commit_folder
from lora_cli.artifacts.merged import check_output
from lora_cli.artifacts.peft_format import peft_files
from lora_cli.artifacts.peft_layers import with_layers
from lora_cli.artifacts.room import make_room
from lora_cli.commands.display import Display
from lora_cli.commands.kept_record import save_with_record
from lora_cli.commands.options import Options
from lora_cli.commands.reading_adapters import ReadAdapter, find_adapter, read_adapter
from lora_cli.config.composed import Composed
from lora_cli.config.conversion import ConvertConfig
from lora_cli.errors import Problem, UserError
from lora_cli.lora.factors import few
from lora_cli.lora.resizing import Resized, resize_factors


def run(composed: Composed, options: Options, display: Display) -> int:
    """Read the adapter, write it anew, and return the exit code."""
    config: ConvertConfig = composed.config
    path, output = find_adapter(config.adapter or ""), Path(config.output or "")
    inputs = [path] if config.base is None else [path, Path(config.base)]
    check_output(output, key="output", overwrite=options.overwrite, inputs=inputs)
    read = read_adapter(path, config)
    resized = {} if config.r is None else _resize(read, config.r)
    adapter = read.adapter
    if resized:
        adapter = with_layers(adapter, {name: layer.factors for name, layer in resized.items()})
    make_room(output)
    if read.record is None:
        files = peft_files(adapter, module_names=read.module_names)
        commit_folder(output, files, facts={}, manifest=False)
        size = sum(map(len, files.values()))
    else:
        size = save_with_record(
            output,
            adapter,
            read.record,
            source=read.path.parent,
            module_names=read.module_names,
        )
    _show(read, resized, config, display)
    display.note(f"adapter: {output} ({size / 1e6:.2f} MB)")
    display.result(
        {
            "output": str(output),
            "bytes": size,
            "format": read.format,
            "base": adapter.base_name,
            "checked_with_base": config.base is not None,
            "energy": _share(read, resized),
            "layers": {
                name: {
                    "r": resized[name].factors.r if name in resized else factors.r,
                    "scale": factors.scale,
                    "energy": resized[name].energy if name in resized else 1.0,
                }
                for name, factors in read.layers.items()
            },
        }
    )
    return 0


def _resize(read: ReadAdapter, r: int) -> dict[str, Resized]:
    """Return every layer in rank `r`.

    Raises:
        UserError: If the adapter has no factors whose rank could be changed.
    """
    grouped = [name for name, f in read.layers.items() if f.groups != 1 and f.r != r]
    why = {
        f"it is of {read.adapter.settings.variant}": not read.layers,
        f"its layers in groups of channels have factors for each group: {few(grouped)}": grouped,
        "a DoRA magnitude belongs to the whole update": read.adapter.settings.variant == "dora"
        and any(factors.r > r for factors in read.layers.values()),
        "it adapts fused weights of experts": read.adapter.target_parameters,
    }
    if found := [reason for reason, is_so in why.items() if is_so]:
        raise UserError(
            Problem(
                id="convert.rank",
                message=f"`r` must be null for this adapter, but is {r}: {found[-1]}.",
                key="r",
                where=str(read.path),
                fix="merge it, and `lora-cli extract base=DIR tuned=DIR lora.r=N output=DIR`",
            )
        )
    return {name: resize_factors(factors, r) for name, factors in read.layers.items()}


def _share(read: ReadAdapter, resized: Mapping[str, Resized]) -> float:
    """Return the share of the squared length of all updates, with their scales, that is kept."""
    squares = [(read.layers[name].scale ** 2, layer) for name, layer in resized.items()]
    whole = sum(square * layer.whole for square, layer in squares)
    return sum(square * layer.kept for square, layer in squares) / whole if whole else 1.0


def _show(
    read: ReadAdapter, resized: Mapping[str, Resized], config: ConvertConfig, display: Display
) -> None:
    display.note(f"format: {read.format}, {len(read.layers)} layers")
    for note in read.notes:
        display.note(note)
    if config.base is None:
        display.note(
            f"shapes were not checked: `base` is null, the adapter names {read.adapter.base_name}"
        )
    if resized:
        rows = [
            [
                name,
                str(read.layers[name].r),
                str(layer.factors.r),
                f"{100 * layer.energy:.2f} %",
            ]
            for name, layer in resized.items()
        ]
        display.table("energy kept", ["layer", "r before", "r", "energy"], rows)
        display.note(f"energy of all updates that is kept: {100 * _share(read, resized):.2f} %")
