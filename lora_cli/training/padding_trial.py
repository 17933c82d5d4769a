"""Whether a model says the same without padding, tried on two real rows."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn

from lora_cli.tasks.contract import Batch, Features, Task
from lora_cli.training.evaluation import evaluating
from lora_cli.training.memory import is_out_of_memory
from lora_cli.training.padding_free import PaddingFree, active_layout, why_padded
from lora_cli.training.runtime import move_to

# Largest difference, as a share of what is compared.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
_COARSE = 5e-2
_LONGER = 1.5
# Rows that two are chosen from.
_LOOKED_AT = 256
# What a model that is not made for it may run into.
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError)


def leave_out_padding(model: Any, task: Task, rows: Sequence[Features]) -> str | None:
    """Let a model train without padding, in place, if that changes nothing.

    Two rows of different length are run in evaluation mode, with padding and without. Hidden states
    of the real tokens behind the last block must be equal, and the loss, to rounding.

    Args:
        model: With adapters in place.
        task: Runs it.
        rows: Encoded training rows.

    Returns:
        Why it trains with padding; None if it does not, and an empty text where its batches have
        none that is known of.
    """
    reason = why_padded(model)
    if reason is not None:
        return reason
    pair = _two_lengths(rows)
    if pair is None:
        return ""
    device = next(model.parameters()).device
    batch = {**move_to(task.collate(pair), device), "generate": False}
    free = PaddingFree(model)
    reason = _compare(model, free, task, batch)
    if reason is not None:
        free.remove()
    return reason


def _compare(model: Any, free: PaddingFree, task: Task, batch: Batch) -> str | None:
    name = type(model).__name__
    seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def note(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        layout = active_layout()
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append((hidden, None if layout is None else layout.places))

    handle = free.last_block.register_forward_hook(note)
    try:
        with evaluating(model), torch.inference_mode():
            # A task may run a model that it has not met before once more, to learn about it.
            task.forward(model, batch)
            seen.clear()
            plain = task.forward(model, batch).loss_sum
            padded = list(seen)
            seen.clear()
            with free.tried():
                loss = task.forward(model, batch).loss_sum
    except _FAILURES as error:
        if is_out_of_memory(error):
            raise
        return f"{name} is not made for it ({type(error).__name__})"
    finally:
        handle.remove()
    if not free.batches:
        return ""
    if [hidden.shape for hidden, _ in padded] != [hidden.shape for hidden, _ in seen]:
        return f"{name} says something else then"
    pairs = [(plain.reshape(1), loss.reshape(1))]
    for (before, _), (after, places) in zip(padded, seen, strict=True):
        if places is not None:
            real = (x.reshape(-1, x.shape[-1])[places] for x in (before, after))
            pairs.append((next(real), next(real)))
    tolerance = _TOLERANCE.get(next(model.parameters()).dtype, _COARSE)
    is_equal = all(_distance(*pair) <= tolerance for pair in pairs)
    return None if is_equal else f"{name} says something else then"


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the length of the difference, as a share of the length of the first."""
    if one.shape != other.shape:
        return float("inf")
    length = max(float(one.float().norm()), torch.finfo(torch.float32).tiny)
    return float((one.float() - other.float()).norm()) / length


def _two_lengths(rows: Sequence[Features]) -> tuple[Features, Features] | None:
    """Return two short rows of different length, None where all are of one.

    They are looked for among the first rows, and behind these only where they are all of one
    length: each row is decoded when it is asked for, and all of them may not fit into memory.
    """
    ranked = sorted(islice(rows, _LOOKED_AT), key=_length)
    if not ranked:
        return None
    first, last = ranked[0], ranked[-1]
    if _length(first) == _length(last):
        others = (row for row in islice(rows, _LOOKED_AT, None) if _length(row) != _length(first))
        other = next(others, None)
        return None if other is None else (first, other)
    longer = (row for row in ranked if _length(row) >= _LONGER * _length(first))
    return first, next(longer, last)


def _length(row: Features) -> int:
    return int(row["length"])
