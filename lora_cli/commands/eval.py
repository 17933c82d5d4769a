"""`lora-cli eval`: base model, adapter, merged model and export, side by side."""

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_cli.artifacts.adapter import Subject, find_subject
from lora_cli.artifacts.commit import replace_file
from lora_cli.artifacts.exporters.onnx import OnnxModel
from lora_cli.artifacts.merged import check_output, folder_bytes
from lora_cli.artifacts.room import make_room
from lora_cli.commands.arranging import leave_out
from lora_cli.commands.classifying import with_labels
from lora_cli.commands.data_report import show_without, without_repeated
from lora_cli.commands.display import Display
from lora_cli.commands.encoding import encode_rows
from lora_cli.commands.merging import TOLERANCE, compare, take_probe
from lora_cli.commands.opening import Opened, load_merged, not_merged, open_adapter
from lora_cli.commands.options import Options
from lora_cli.commands.reporting import show_comparison, show_report
from lora_cli.commands.writing import for_evaluation
from lora_cli.config.commands import EvalConfig
from lora_cli.config.composed import Composed
from lora_cli.errors import Problem, UserError
from lora_cli.lora.strategies import check_mergeable, why_unmergeable
from lora_cli.tasks.contract import Features, Task
from lora_cli.training.evaluation import Evaluation, evaluate_rows
from lora_cli.training.runtime import device_of

_PROBE_ROWS = 16


def run(composed: Composed, options: Options, display: Display) -> int:
    """Evaluate, show and write the predictions; return the exit code."""
    config: EvalConfig = composed.config
    if config.output is not None:
        check_output(Path(config.output), key="output", overwrite=options.overwrite, is_file=True)
    _check_models(config, find_subject(config.from_ or ""))
    opened = open_adapter(config.from_ or "", base=config.base, display=display)
    settings = for_evaluation(
        opened.config.task, generate=config.generate, generation=config.generation
    )
    opened = opened.with_task(with_labels(settings, config.zero_shot))
    strategy = opened.config.strategy.name
    if config.merged is not None:
        check_mergeable(strategy, key="merged", fix="leave merged out")
    splits, task = opened.load_splits(config.task.data)
    for note in splits.notes:
        display.note(note)
    split = _choose_split(config.split, list(splits.rows))
    rows = splits.rows[split]
    # The task is that of the record, unless other rows were named.
    state = opened.record.state if config.task.data.path is None else splits.state
    facts = opened.encoding_facts(state)
    features = leave_out(encode_rows(task, rows, split, display, facts=facts), split, display)

    models = _models(opened, config, task, features)
    evaluations, sizes = {}, {}
    for name, load in models.items():
        model, sizes[name] = load()
        display.note(f"evaluating {name} on {len(features):,} rows of {split}")
        evaluations[name] = _evaluate(task, model, features, config)
    metrics: dict[str, dict[str, float] | None] = {
        name: evaluation.metrics(task) for name, evaluation in evaluations.items()
    }
    if why := why_unmergeable(strategy):
        metrics["merged"] = None
        display.note(f"not merged: {why}")

    output = _output(opened, config, split)
    if output is not None:
        lines = [
            json.dumps(task.to_json(prediction), ensure_ascii=False) + "\n"
            for prediction in evaluations["adapter"].predictions
        ]
        make_room(output)
        replace_file(output, "".join(lines).encode())
    show_report(display, task.report(evaluations["adapter"].predictions))
    show_comparison(display, split, len(features), metrics, sizes=sizes)
    without = without_repeated(
        task, evaluations["adapter"], splits.repeated.get(split, frozenset())
    )
    if without is not None:
        show_without(display, without)
    if output is not None:
        display.note(f"predictions: {output}")
    if opened.subject.run is not None:
        display.note(f"run directory: {opened.subject.run}")
    result = {"split": split, "rows": len(features), **metrics, "bytes": sizes}
    display.result(result if without is None else {**result, "without_repeated": without})
    return 0


def _check_models(config: EvalConfig, subject: Subject) -> None:
    """Refuse what is no merged model or export before anything is loaded."""
    problems = []
    if config.merged is not None and not os.path.isfile(Path(config.merged) / "config.json"):  # noqa: PTH113, a name may be too long
        problems.append(not_merged(config.merged, "is no folder with config.json", subject))
    if config.exported is not None and not os.path.isfile(config.exported):  # noqa: PTH113
        problems.append(
            Problem(
                id="eval.no-export",
                message="`exported` must be an ONNX file, but there is no such file: "
                f'"{config.exported}".',
                key="exported",
                fix=f"lora-cli export {shlex.quote(str(subject.adapter))} format=onnx "
                + shlex.quote(f"output={config.exported}"),
            )
        )
    if problems:
        raise UserError(problems)


def _models(
    opened: Opened, config: EvalConfig, task: Task, features: Sequence[Features]
) -> Mapping[str, Callable[[], tuple[Callable[..., Any], int]]]:
    """Return the models to evaluate in order, each loaded when its turn comes.

    Base, adapter and merged share the weights in memory, so the order matters.
    """

    def base() -> tuple[Callable[..., Any], int]:
        return opened.base.model, opened.source.weights_bytes

    def adapter() -> tuple[Callable[..., Any], int]:
        return opened.attach(), folder_bytes(opened.subject.adapter)

    def merged() -> tuple[Callable[..., Any], int]:
        if config.merged is not None:
            return _load_merged(opened, config.merged, task, features[:_PROBE_ROWS])
        model = opened.base.model
        opened.merge()
        return model, sum(p.numel() * p.element_size() for p in model.parameters())

    def exported() -> tuple[Callable[..., Any], int]:
        path = Path(config.exported or "")
        return OnnxModel(path), folder_bytes(path)

    models = {"base": base, "adapter": adapter, "merged": merged}
    if why_unmergeable(opened.config.strategy.name):
        del models["merged"]
    return {**models, "exported": exported} if config.exported is not None else models


def _load_merged(
    opened: Opened, path: str, task: Task, features: Sequence[Features]
) -> tuple[Callable[..., Any], int]:
    """Load a merged model, and compare it with the adapter, which is in the base by now.

    Raises:
        UserError: If it is another adapter's.
    """
    model = load_merged(opened, path)
    probe = take_probe(task, opened.base.model, features, split="")
    coarser = max(model.dtype, opened.base.model.dtype, key=lambda dtype: TOLERANCE.get(dtype, 0))
    found, tolerance = compare(probe, model, coarser)
    if found.max_abs_difference > tolerance:
        why = f"says something else than the adapter on {found.text}"
        raise UserError(not_merged(path, why, opened.subject))
    return model, _weights_bytes(Path(path))


def _evaluate(
    task: Task, model: Callable[..., Any], features: Sequence[Features], config: EvalConfig
) -> Evaluation:
    return evaluate_rows(
        task, model, features, batch_size=config.batch_size, device=device_of(model)
    )


def _choose_split(wanted: str | None, names: list[str]) -> str:
    """Return `wanted`, or test, or validation, or the only one there is."""
    usual = [name for name in ("test", "validation", *names) if name in names]
    split = wanted or usual[0]
    if split not in names:
        raise UserError(
            Problem(
                id="data.no-such-split",
                message=f'`split` must be a split of the data, but is "{split}".',
                key="split",
                allowed=", ".join(names),
                fix=f"split={usual[0]}",
            )
        )
    return split


def _output(opened: Opened, config: EvalConfig, split: str) -> Path | None:
    if config.output is not None:
        return Path(config.output)
    if opened.subject.run is None:
        return None
    name = split if config.task.data.path is None else _own_name(config.task.data.path, split)
    return opened.subject.run / "predictions" / f"{name}.jsonl"


def _own_name(path: str, split: str) -> str:
    """Name predictions of other rows than the run's so that they do not replace the run's own."""
    whole = Path(path).expanduser().absolute()
    if not whole.is_file():
        return f"{whole.name}-{split}"
    is_usual = whole.stem in ("train", "validation", "test")
    return f"{whole.parent.name}-{whole.stem}" if is_usual else whole.stem


def _weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
