"""How a merged model is compared with the adapter: by outputs, tensor by tensor, or not at all."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from lora_cli.artifacts.merge_check import TensorCheck, check_tensor, worst
from lora_cli.artifacts.merge_plan import Shard
from lora_cli.artifacts.merge_stream import one_thread
from lora_cli.artifacts.tensor_files import StoredWeights, read_weights
from lora_cli.commands.display import Display
from lora_cli.commands.free_memory import free_memory
from lora_cli.config.commands import TrainConfig
from lora_cli.config.merging import MergeConfig
from lora_cli.errors import Problem, RunFailedError

Way = Literal["logits", "layers", "none"]
# Of the free memory, what the weights of the model may take: outputs of a model need some too.
_SHARE = 0.5
_MOST_THREADS = 4
_WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


def choose_way(
    config: MergeConfig, trained: TrainConfig, weights: StoredWeights, display: Display
) -> Way:
    """Return how to compare: what `verify` asks for, or what fits into memory, which is told.

    Args:
        config: The settings.
        trained: Those of the adapter, which know where its rows are.
        weights: The headers of the base.
        display: Told what was chosen, and why.
    """
    if config.verify != "auto":
        return config.verify
    if config.check_rows == 0:
        return _told("check_rows is 0", display)
    if not knows_rows(config, trained):
        return _told("the adapter does not know where its rows are", display)
    needed, free = _model_bytes(trained, weights), free_memory()
    if free is not None and needed > _SHARE * free:
        return _told(
            f"the model takes {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB of free memory", display
        )
    return "logits"


def knows_rows(config: MergeConfig, trained: TrainConfig) -> bool:
    """Whether there are rows to compare outputs on."""
    return trained.task.data.path is not None or config.task.data.path is not None


def _told(reason: str, display: Display) -> Way:
    display.note(f"verify=layers, since {reason}")
    return "layers"


def _model_bytes(trained: TrainConfig, weights: StoredWeights) -> int:
    """Return the size of the weights in the number format that the model is loaded in."""
    width = _WIDTHS.get(trained.model.dtype)
    if width is None:
        return weights.num_bytes
    stored = weights.main_dtype.itemsize
    return weights.num_bytes * width // stored


def check_layers(
    shards: Iterable[Shard], folder: Path, *, seed: int, display: Display
) -> dict[str, Any]:
    """Compare each tensor that was written with base and update; memory holds a few rows of some.

    Args:
        shards: What was to be written.
        folder: Where it was.
        seed: Decides the random inputs.
        display: Shown how far it is, and the result.

    Returns:
        The result as JSON values.

    Raises:
        RunFailedError: If one says something else.
    """
    written = read_weights(folder).tensors
    pieces = [piece for shard in shards for piece in shard.pieces if piece.change is not None]
    checks = []
    total = sum(piece.num_bytes for piece in pieces)
    with ExitStack() as stack:
        advance = stack.enter_context(display.transfer("verify", total))
        stack.enter_context(one_thread())
        pool = stack.enter_context(ThreadPoolExecutor(_num_threads()))
        waiting = [
            (piece, pool.submit(check_tensor, piece, written[piece.name], seed=seed))
            for piece in pieces
        ]
        # Whatever has not begun when one of them fails never does.
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        for piece, future in waiting:
            checks.append(future.result())
            if not checks[-1].passed:
                raise _differs(checks[-1])
            advance(piece.num_bytes)
    return _result(checks, display)


def _num_threads() -> int:
    """Return how many tensors are compared at once: as many as there are processors, or few."""
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)))


def _result(checks: list[TensorCheck], display: Display) -> dict[str, Any]:
    found = worst(checks)
    kept = [check for check in checks if check.kept is not None]
    least = min(kept, key=lambda check: check.kept or 0.0, default=None)
    result: dict[str, Any] = {
        "verify": "layers",
        "tensors": len(checks),
        "largest_difference": None if found is None else max(found.largest, found.mean),
        "update_kept": None if least is None else least.kept,
    }
    if found is None:
        display.note("merged against adapter: no tensor changed")
        return result
    text = (
        f"merged against adapter, {len(checks)} tensors: largest difference "
        f"{100 * max(found.largest, found.mean):.0f} % of what rounding explains ({found.name})"
    )
    if least is not None:
        text += f"; after rounding {100 * (least.kept or 0.0):.1f} % of each update is left or more"
    display.note(text)
    return result


def _differs(check: TensorCheck) -> RunFailedError:
    return RunFailedError(
        Problem(
            id="merge.differs",
            message=f"The merged model must say what the adapter says, but {check.name} is "
            f"{max(check.largest, check.mean):.3g} times farther off than rounding explains.",
            allowed="a difference of at most what rounding to the number format explains",
            fix="nothing was written; report this with the model that you use",
        )
    )
