"""`lora-cli merge`: one adapter, or several combined, added into the base weights or kept apart."""

from pathlib import Path
from typing import Any

from lora_cli.artifacts.merged import check_output, save_merged
from lora_cli.artifacts.room import make_room
from lora_cli.commands.combining import open_combined, write_combined
from lora_cli.commands.display import Display
from lora_cli.commands.merging import Probe, merge_with_probe, show_same
from lora_cli.commands.opening import Opened, default_output, load_merged, open_adapter
from lora_cli.commands.options import Options
from lora_cli.config.commands import MergeConfig
from lora_cli.config.composed import Composed


def run(composed: Composed, options: Options, display: Display) -> int:
    """Combine where there are several, merge, write, read back, compare; return the exit code."""
    config: MergeConfig = composed.config
    if config.adapters:
        return _run_combined(config, options, display)
    opened = open_adapter(config.from_ or "", base=config.base, display=display)
    output = default_output(opened.subject, config.output, "merged")
    check_output(output, key="output", overwrite=options.overwrite, inputs=opened.inputs)
    display.result(_merge(config, opened, output, display=display))
    return 0


def _run_combined(config: MergeConfig, options: Options, display: Display) -> int:
    # Looked at before anything is loaded, and again once it is known where the base is.
    output = Path(config.output or "")
    check_output(output, key="output", overwrite=options.overwrite)
    combined = open_combined(config, display)
    check_output(output, key="output", overwrite=options.overwrite, inputs=combined.inputs)
    if config.into == "model":
        result = _merge(config, combined.opened, output, display=display)
    else:
        make_room(output)
        size = write_combined(combined, output)
        display.note(f"adapter: {output} ({size / 1e6:.2f} MB)")
        result = {"output": str(output), "bytes": size}
    display.result({**result, **combined.opened.record.combined})
    return 0


def _merge(
    config: MergeConfig, opened: Opened, output: Path, *, display: Display
) -> dict[str, Any]:
    model, probe = merge_with_probe(opened, config.task.data, check_rows=config.check_rows)
    make_room(output)
    return _write(opened, model, probe, output, display=display)


def _write(
    opened: Opened, model: Any, probe: Probe | None, output: Path, *, display: Display
) -> dict[str, Any]:
    """Write the merged model, once what was written says what the adapter says."""
    result: dict[str, Any] = {
        "output": str(output),
        "dtype": str(model.dtype).removeprefix("torch."),
    }

    def check(staged: Path) -> None:
        if probe is not None:
            found = show_same(probe, load_merged(opened, str(staged)), display)
            result.update(found.as_json())

    size = save_merged(model, opened.processor, output, check=check)
    display.note(f"merged model: {output} ({size / 1e6:.1f} MB, {result['dtype']})")
    return {**result, "bytes": size}
