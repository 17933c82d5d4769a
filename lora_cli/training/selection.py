"""Which evaluation is the best so far, and how long ago the last improvement was."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from lora_cli.training.events import Progress


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().tobytes())
    return digest.hexdigest()


def judge(
    progress: Progress, value: float, *, greater_is_better: bool, threshold: float
) -> tuple[Progress, bool]:
    """Take in the result of an evaluation.

    Args:
        progress: Where the run stands.
        value: Of the selecting metric.
        greater_is_better: Whether a larger value is an improvement.
        threshold: Smallest change that early stopping counts as one.

    Returns:
        Where the run stands now, and whether this is the best value so far. The untrained model
        at step 0 is shown, but cannot be the best.
    """
    if progress.step == 0:
        return progress, False
    gain = math.inf
    if progress.best_metric is not None:
        gain = (1 if greater_is_better else -1) * (value - progress.best_metric)
    waited = 0 if gain > threshold else progress.evaluations_without_improvement + 1
    progress = replace(progress, evaluations_without_improvement=waited)
    if gain > 0:
        return replace(progress, best_metric=value, best_step=progress.step), True
    return progress, False
