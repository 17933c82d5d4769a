"""`lora-cli export`: the adapter or the merged model in a format that other programs read."""

from pathlib import Path
from typing import Any

from torch import nn

from lora_cli.artifacts.commit import put_in_place, staged_beside
from lora_cli.artifacts.export import EXPORTERS, ExportInputs, check_format
from lora_cli.artifacts.merged import check_output, folder_bytes
from lora_cli.artifacts.room import make_room
from lora_cli.artifacts.tuned import Tuned
from lora_cli.commands.display import Display
from lora_cli.commands.locating import default_output
from lora_cli.commands.merging import Probe, check_same, merge_with_probe
from lora_cli.commands.opening import Opened, open_adapter
from lora_cli.commands.options import Options
from lora_cli.config.commands import ExportConfig
from lora_cli.config.composed import Composed
from lora_cli.errors import Problem, UserError
from lora_cli.lora.strategies import why_unmergeable
from lora_cli.training.runtime import default_device

_DETECTING = "AutoModelForObjectDetection"
_WRITING = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText",
)


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
    _check_head(opened, config.format_)
    if exporter.read is None:
        _check_peft(opened)
        model, probe = opened.base.model, None
    else:
        model, probe = merge_with_probe(opened, config.task.data, check_rows=config.check_rows)
    result: dict[str, Any] = {"output": str(output), "format": config.format_}
    make_room(output)
    with staged_beside(output) as staged:
        path = staged / output.name
        exporter.write(_inputs(opened, model, probe, path))
        if exporter.read is not None and probe is not None:
            written = exporter.read(path, opened.family.auto_class)
            if isinstance(written, nn.Module):
                written.to(default_device())
            found = check_same(probe, written, model.dtype, what="exported")
            display.note(f"exported against adapter on {probe.split}: {found.text}")
            result |= found.as_json()
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


def _check_head(opened: Opened, format_: str) -> None:
    """Refuse ONNX for models that write, which run many times for one text, or find boxes.

    Raises:
        UserError: If it is such a model.
    """
    if format_ == "onnx" and opened.family.auto_class in _WRITING:
        raise UserError(
            Problem(
                id="export.no-onnx",
                message="`format` must suit the task, but a model of "
                f"task={opened.config.task.family} writes token by token, with a cache that an "
                "ONNX file of lora-cli has not.",
                key="format",
                allowed=", ".join(name for name in EXPORTERS if name != "onnx"),
                fix="format=hf, which programs that serve language models read",
            )
        )
    if format_ == "onnx" and opened.family.auto_class == _DETECTING:
        raise UserError(
            Problem(
                id="export.no-onnx",
                message="`format` must suit the task, but a model of "
                f"task={opened.config.task.family} reads images in many sizes, and an ONNX file "
                "of lora-cli has one size of images.",
                key="format",
                allowed=", ".join(name for name in EXPORTERS if name != "onnx"),
                fix="format=hf writes the merged model in its own format",
            )
        )


def _inputs(opened: Opened, model: Any, probe: Probe | None, output: Path) -> ExportInputs:
    return ExportInputs(
        adapter_folder=opened.subject.adapter,
        model=model.cpu(),
        processor=opened.processor,
        labels=tuple(opened.record.state.get("labels", ())),
        max_length=getattr(opened.config.task, "max_length", None),
        output=output,
        example=None if probe is None else probe.example,
    )
