"""What merging changes for an adapter of a quantized base: it was trained on rounded weights.

The update was fitted to weights in 8 or 4 bits, and is merged into those before that. Both models
are run on the same rows: all of the split, since the first ones of a file may be of one label.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from lora_cli.artifacts.peft_format import PeftAdapter
from lora_cli.commands.display import Display
from lora_cli.commands.merging import rows_to_compare
from lora_cli.commands.opening import Opened, open_adapter
from lora_cli.config.merging import MergeConfig
from lora_cli.lora.inject import saved_modules
from lora_cli.models.quantization import quantize_base
from lora_cli.tasks.contract import Features, Task
from lora_cli.training.evaluation import evaluate_rows
from lora_cli.training.runtime import device_of

_BATCH = 16


def score_both(
    config: MergeConfig, opened: Opened, merged: Any, *, display: Display
) -> dict[str, Any]:
    """Show the metrics of the adapter on its quantized base, and of the merged model.

    Args:
        config: The settings.
        opened: The adapter; its model is not used.
        merged: The merged model.
        display: Shown both.

    Returns:
        "scores" for the result, with "split", "rows", "quantized" and "merged"; nothing for an
        adapter whose base was not quantized, or for several adapters.
    """
    kind = opened.config.model.quantization
    if kind == "none" or not config.from_:
        return {}
    if find_spec("bitsandbytes") is None:
        display.note(f"not compared with the base in {kind}, since bitsandbytes is not installed")
        return {}
    split, task, rows = rows_to_compare(opened, config.task.data)
    display.note(f"evaluating both models on {len(rows):,} rows of {split}")
    whole = _metrics(task, merged, rows)
    rounded = _metrics(task, _as_trained(config, kind), rows)
    names = list(dict.fromkeys((*rounded, *whole)))
    forms = {f"{kind} base and adapter": rounded, "merged, whole weights": whole}
    display.table(
        f"{split} ({len(rows):,} rows)",
        ["model", *names],
        [
            [form, *(f"{found[name]:.4f}" if name in found else "" for name in names)]
            for form, found in forms.items()
        ],
    )
    scores = {"split": split, "rows": len(rows), "quantized": rounded, "merged": whole}
    return {"scores": scores}


def _as_trained(config: MergeConfig, kind: str) -> Any:
    """Load the base and quantize it as for training, and put the adapter in."""
    opened = open_adapter(config.from_ or "", base=config.base)
    adapter, model = opened.adapter, opened.base.model
    new = saved_modules(model, opened.base.new_keys, ())
    whole = adapter.saved_modules if isinstance(adapter, PeftAdapter) else new
    quantize_base(model, kind, keep=whole)
    return opened.attach()


def _metrics(task: Task, model: Callable[..., Any], rows: Sequence[Features]) -> dict[str, float]:
    found = evaluate_rows(task, model, rows, batch_size=_BATCH, device=device_of(model))
    return found.metrics(task)
