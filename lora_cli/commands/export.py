"""`lora-cli export`: the adapter or the merged model in a format that other programs read."""

from pathlib import Path
from typing import Any

from torch import nn

from lora_cli.artifacts.commit import put_in_place, staged_beside
from lora_cli.artifacts.export import EXPORTERS, check_candidate, check_format
from lora_cli.artifacts.exporters.contract import Candidate, Exporter, ExportInputs, Reading
from lora_cli.artifacts.merged import check_output, folder_bytes
from lora_cli.artifacts.room import make_room
from lora_cli.artifacts.tuned import Tuned
from lora_cli.commands.display import Display
from lora_cli.commands.locating import default_output
from lora_cli.commands.merging import Probe, check_same, merge_with_probe
from lora_cli.commands.opening import Opened, open_adapter
from lora_cli.commands.options import Options
from lora_cli.commands.rounded import check_rounded
from lora_cli.config.composed import Composed
from lora_cli.config.exporting import ExportConfig
from lora_cli.errors import Problem, UserError
from lora_cli.lora.strategies import why_unmergeable
from lora_cli.training.runtime import default_device


def run(composed: Composed, options: Options, display: Display) -> int:
    """Export, compare, and return the exit code."""
    config: ExportConfig = composed.config
    check_format(config.format_)
    exporter = EXPORTERS[config.format_]
    opened = open_adapter(config.from_ or "", base=config.base, display=display)
    output = default_output(opened.subject, config.output, exporter.name)
    check_output(
        output,
        key="output",
        overwrite=options.overwrite,
        is_file=exporter.is_file,
        inputs=opened.inputs,
    )
    check_candidate(config.format_, _candidate(opened, config))
    if exporter.read is None:
        _check_peft(opened)
        model, probe = opened.base.model, None
    else:
        model, probe = merge_with_probe(opened, config.task.data, check_rows=config.check_rows)
    result: dict[str, Any] = {"output": str(output), "format": config.format_}
    make_room(output)
    with staged_beside(output) as staged:
        path = staged / output.name
        inputs = _inputs(opened, config, model, probe, path)
        exporter.write(inputs)
        result |= _compared(opened, exporter, inputs, probe, display)
        # The weights of a very large graph are a second file, which must be there before it.
        for extra in staged.iterdir():
            if extra != path:
                extra.replace(output.parent / extra.name)
        put_in_place(path, output)
    size = folder_bytes(output)
    display.note(f"exported: {output} ({size / 1e6:.1f} MB, {config.format_})")
    display.result({**result, "bytes": size})
    return 0


def _check_peft(opened: Opened) -> None:
    """Refuse to call a folder an adapter of PEFT that PEFT cannot load.

    Raises:
        UserError: If it is none.
    """
    adapter = opened.adapter
    if isinstance(adapter, Tuned) and not adapter.loads_in_peft:
        raise UserError(
            Problem(
                id="export.not-peft",
                message="`format` must suit what was trained, but peft cannot load what "
                f"strategy={opened.config.strategy.name} trains for "
                f"task={opened.config.task.family}.",
                key="format",
                allowed=", ".join(name for name in EXPORTERS if name != "peft"),
                fix="format=hf writes the tuned model"
                if why_unmergeable(opened.config.strategy.name) is None
                else "copy the adapter folder as it is, for lora-cli",
            )
        )


def _candidate(opened: Opened, config: ExportConfig) -> Candidate:
    return Candidate(
        family=opened.config.task.family,
        auto_class=opened.family.auto_class,
        model=opened.base.model,
        processor=opened.processor,
        adapter=opened.adapter,
        gguf_type=config.gguf_type,
    )


def _compared(
    opened: Opened,
    exporter: Exporter,
    inputs: ExportInputs,
    probe: Probe | None,
    display: Display,
) -> dict[str, Any]:
    """Load what was written in its runtime, compare it with the adapter, and tell the result."""
    if exporter.read is None or probe is None:
        return {}
    model: Any = inputs.model
    written = exporter.read(
        inputs.output, Reading(auto_class=opened.family.auto_class, load_base=opened.load_again)
    )
    if isinstance(written, nn.Module):
        written.to(default_device())
    noise = exporter.noise(inputs)
    if noise is None:
        same = check_same(probe, written, model.dtype, what="exported")
        display.note(f"exported against adapter on {probe.split}: {same.text}")
        return same.as_json()
    rounded = check_rounded(probe, written, model, noise)
    display.note(f"exported against adapter on {probe.split}: {rounded.text}")
    return rounded.as_json()


def _inputs(
    opened: Opened, config: ExportConfig, model: Any, probe: Probe | None, output: Path
) -> ExportInputs:
    return ExportInputs(
        adapter_folder=opened.subject.adapter,
        model=model.cpu(),
        processor=opened.processor,
        labels=tuple(opened.record.state.get("labels", ())),
        max_length=getattr(opened.config.task, "max_length", None),
        output=output,
        example=None if probe is None else probe.example,
        gguf_type=config.gguf_type,
        name=Path(str(opened.record.base.get("name") or "model")).name,
        adapter=opened.adapter,
    )
