"""What happens to the summed gradients between the last backward pass and the optimizer."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from lora_cli.errors import Problem, RunFailedError


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply every gradient, in place."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def add_penalty(parameters: Iterable[nn.Parameter], penalty: torch.Tensor) -> None:
    """Add the gradient of `penalty` to the gradients, in place.

    It is a function of the parameters alone, equal in all processes, so that nothing has to be
    exchanged.
    """
    chosen = list(parameters)
    extra = torch.autograd.grad(penalty, chosen, allow_unused=True)
    for parameter, gradient in zip(chosen, extra, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.add_(gradient)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None) -> float:
    """Shorten the gradient to at most `limit`, in place, and return its length before."""
    chosen = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in chosen if p.grad is not None])
    if limit is not None:
        nn.utils.clip_grads_with_norm_(chosen, limit, norm)
    return float(norm)


def check_finite(
    loss_sum: float,
    grad_norm: float,
    *,
    step: int,
    ids: Sequence[object],
    loss_scale: tuple[float, int] | None = None,
) -> None:
    """Stop a run that diverged.

    Args:
        loss_sum: Summed loss of the step.
        grad_norm: Length of its gradient.
        step: Number of the step, counted from 1.
        ids: Of the rows of the step.
        loss_scale: What the loss is multiplied by, if there is a scaler. It skips a step whose
            gradient overflowed and halves the scale, which helps for as long as that is above 1.

    Raises:
        RunFailedError: If one of the two is not finite.
    """
    may_overflow = loss_scale is not None and loss_scale[0] > 1
    if math.isfinite(loss_sum) and (math.isfinite(grad_norm) or may_overflow):
        return
    what = "loss" if not math.isfinite(loss_sum) else "gradient"
    more = f" and {len(ids) - 10} more" if len(ids) > 10 else ""
    raise RunFailedError(
        Problem(
            id="train.not-finite",
            message=f"The {what} must be finite, but is not at step {step}.",
            where=f"rows with id {', '.join(map(str, ids[:10]))}{more}",
            fix="lower optimizer.lr, or look at these rows",
        )
    )


def check_weights(tensors: Mapping[str, torch.Tensor], *, step: int) -> None:
    """Stop a run whose weights or moments have become useless, before anything is done with them.

    Args:
        tensors: By name.
        step: Optimizer steps done.

    Raises:
        RunFailedError: If a number in them is not finite.
    """
    bad = [name for name, x in tensors.items() if not bool(torch.isfinite(x).all())]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise RunFailedError(
            Problem(
                id="train.not-finite",
                message="The trained weights and their moments must be finite, but are not after"
                f" step {step}.",
                where=f"{bad[0]}{more}",
                fix="lower optimizer.lr",
            )
        )
