"""`lora-cli merge`: one adapter, or several combined, added into the base weights or kept apart.

One adapter is merged tensor by tensor where that can be done; what builds a model is imported only
where one is needed.
"""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_cli.artifacts.adapter import find_subject, load_adapter
from lora_cli.artifacts.merge_names import FAMILIES as LIGHT_FAMILIES
from lora_cli.artifacts.merge_names import CannotStreamError
from lora_cli.artifacts.merged import check_output, save_merged
from lora_cli.artifacts.room import make_room
from lora_cli.artifacts.tensor_files import StoredWeights
from lora_cli.commands.display import Display
from lora_cli.commands.locating import (
    base_path,
    check_base_settings,
    check_base_weights,
    default_output,
)
from lora_cli.commands.options import Options
from lora_cli.commands.recorded import training_config
from lora_cli.commands.streaming import Plan, Request, plan_merge, read_headers, write_merge
from lora_cli.commands.verifying import check_layers, choose_way, knows_rows
from lora_cli.config.commands import TrainConfig
from lora_cli.config.composed import Composed
from lora_cli.config.merging import MergeConfig
from lora_cli.config.size import parse_size
from lora_cli.errors import Problem, UserError
from lora_cli.lora.strategies import check_mergeable
from lora_cli.models.sources import locate_model, resolve_model

if TYPE_CHECKING:
    from lora_cli.commands.merging import Probe
    from lora_cli.commands.opening import Opened

_SEED = 0


def run(composed: Composed, options: Options, display: Display) -> int:
    """Combine where there are several, merge, write, read back, compare; return the exit code."""
    config: MergeConfig = composed.config
    if config.adapters:
        return _run_combined(config, options, display)
    request = _read(config)
    source, subject = request.source, request.subject
    output = default_output(subject, config.output, "merged")
    inputs = [subject.adapter, source.folder]
    check_output(output, key="output", overwrite=options.overwrite, inputs=inputs)
    try:
        weights = read_headers(source)
        way = choose_way(config, request.trained, weights, display)
        plan = _plan(request, weights, config)
    except CannotStreamError as error:
        result = _through_model(config, request, str(error), output, display=display)
    else:
        check = _checker(way, config, request.trained, plan, display)
        result = write_merge(request, plan, output, check=check, sync=config.sync, display=display)
    display.result(result)
    return 0


def _read(config: MergeConfig) -> Request:
    """Read the adapter and find its base, of which settings are compared, and not yet weights."""
    subject = find_subject(config.from_ or "")
    adapter, record = load_adapter(subject.adapter)
    trained = training_config(record, subject)
    folder = shlex.quote(str(subject.adapter))
    check_mergeable(
        trained.strategy.name,
        key="from",
        fix=f"lora-cli predict {folder} text=TEXT runs it as it is",
    )
    source = locate_model(
        config.base or base_path(trained, record, subject),
        revision=trained.model.revision,
        processor=_processor(trained),
    )
    check_base_settings(source, record, subject)
    return Request(subject=subject, adapter=adapter, record=record, trained=trained, source=source)


def _processor(trained: TrainConfig) -> str:
    if trained.task.family in LIGHT_FAMILIES:
        return "tokenizer"
    from lora_cli.tasks.table import FAMILIES

    return FAMILIES[trained.task.family].processor


def _plan(request: Request, weights: StoredWeights, config: MergeConfig) -> Plan:
    """Plan the merge; of a base that is another one that is told first."""
    try:
        return plan_merge(request, weights, config)
    except UserError:
        source = request.source
        hashed = resolve_model(str(source.place), processor=_processor(request.trained))
        check_base_weights(hashed, request.record, request.subject)
        raise


def _checker(
    way: str, config: MergeConfig, trained: TrainConfig, plan: Plan, display: Display
) -> Callable[[Path], dict[str, Any]]:
    """Return what compares the merged model with the adapter, whose outputs are taken now."""
    kind = trained.model.quantization
    if way != "logits" and kind != "none":
        display.note(
            f"the adapter was trained on weights in {kind}; verify=logits shows the metrics on "
            "these beside those of the merged model"
        )
    if way == "none":
        return lambda _: {}
    if way == "layers":
        return lambda folder: check_layers(plan.shards, folder, seed=_SEED, display=display)
    from lora_cli.commands.merging import outputs_before, show_same
    from lora_cli.commands.opening import load_merged, open_adapter
    from lora_cli.commands.quantized_scores import score_both

    opened = open_adapter(config.from_ or "", base=config.base, display=display)
    light, probe, dtype = outputs_before(opened, config.task.data, check_rows=config.check_rows)
    del opened

    def check(folder: Path) -> dict[str, Any]:
        merged = load_merged(light, str(folder))
        found = show_same(probe, merged, display, dtype=dtype)
        scores = score_both(config, light, merged, display=display)
        return {"verify": "logits", **found.as_json(), **scores}

    return check


def _run_combined(config: MergeConfig, options: Options, display: Display) -> int:
    from lora_cli.commands.combining import open_combined, write_combined

    # Looked at before anything is loaded, and again once it is known where the base is.
    output = Path(config.output or "")
    check_output(output, key="output", overwrite=options.overwrite)
    combined = open_combined(config, display)
    check_output(output, key="output", overwrite=options.overwrite, inputs=combined.inputs)
    if config.into == "model":
        why = "several adapters are combined in memory"
        _refuse_layers(config, why)
        result = _merge_model(config, combined.opened, output, display=display)
    else:
        make_room(output)
        size = write_combined(combined, output)
        display.note(f"adapter: {output} ({size / 1e6:.2f} MB)")
        result = {"output": str(output), "bytes": size}
    display.result({**result, **combined.opened.record.combined})
    return 0


def _through_model(
    config: MergeConfig, request: Request, why: str, output: Path, *, display: Display
) -> dict[str, Any]:
    """Merge in memory what cannot be merged tensor by tensor, and say why."""
    from lora_cli.commands.opening import open_adapter

    _refuse_layers(config, why)
    display.note(f"merging through the whole model, since {why}")
    opened = open_adapter(config.from_ or "", base=config.base, display=display)
    if config.verify == "auto" and not knows_rows(config, request.trained):
        display.note("not compared, since the adapter does not know where its rows are")
        return _merge_model(config, opened, output, display=display, check_rows=0)
    return _merge_model(config, opened, output, display=display)


def _refuse_layers(config: MergeConfig, why: str) -> None:
    if config.verify == "layers":
        raise UserError(
            Problem(
                id="merge.no-layers",
                message="`verify` must be logits or none where the whole model is merged in "
                f"memory, but is layers, and {why}.",
                key="verify",
                allowed="auto, logits, none",
                fix="verify=logits",
            )
        )


def _merge_model(
    config: MergeConfig,
    opened: "Opened",
    output: Path,
    *,
    display: Display,
    check_rows: int | None = None,
) -> dict[str, Any]:
    from lora_cli.commands.merging import merge_with_probe

    rows = config.check_rows if check_rows is None else check_rows
    rows = 0 if config.verify == "none" else rows
    model, probe = merge_with_probe(opened, config.task.data, check_rows=rows)
    make_room(output)
    return _write_model(config, opened, model, probe, output, display=display)


def _write_model(
    config: MergeConfig,
    opened: "Opened",
    model: Any,
    probe: "Probe | None",
    output: Path,
    *,
    display: Display,
) -> dict[str, Any]:
    """Write the merged model, once what was written says what the adapter says."""
    from lora_cli.commands.merging import show_same
    from lora_cli.commands.opening import load_merged
    from lora_cli.commands.quantized_scores import score_both

    trained_in = model.dtype
    if config.dtype != "auto":
        model.to(getattr(torch, config.dtype))
    name = str(model.dtype).removeprefix("torch.")
    result: dict[str, Any] = {"output": str(output), "dtype": name}

    def check(staged: Path) -> None:
        if probe is not None:
            merged = load_merged(opened, str(staged))
            found = show_same(probe, merged, display, dtype=trained_in)
            scores = score_both(config, opened, merged, display=display)
            result.update({"verify": "logits", **found.as_json(), **scores})

    limit = None if config.max_shard_size is None else parse_size(config.max_shard_size)
    size = save_merged(
        model, opened.processor, output, check=check, max_bytes=limit, sync=config.sync
    )
    display.note(f"merged model: {output} ({size / 1e6:.1f} MB, {name})")
    return {**result, "bytes": size}
