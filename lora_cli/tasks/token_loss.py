"""Cross-entropy over a vocabulary, a slice of the tokens at a time.

Shapes: N tokens, H hidden units, V entries of the vocabulary; C tokens of a slice.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Scores at once: 128 MB in float32.
_NUMBERS_AT_ONCE = 2**25


def own_and_best(logits_NV: torch.Tensor, true_N: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of true tokens and of the best other ones, (N, 2), float32."""
    log_probs_NV = logits_NV.float().log_softmax(dim=-1)
    true_N1 = true_N.unsqueeze(1)
    own_N = log_probs_NV.gather(1, true_N1).squeeze(1)
    best_N = log_probs_NV.scatter(1, true_N1, -torch.inf).amax(dim=1)
    return torch.stack([own_N, best_N], dim=1)


def cut_rows(rows: torch.Tensor, width: int) -> list[slice]:
    """Return slices of rows that have at most `_NUMBERS_AT_ONCE` scores of `width` tokens."""
    size = max(1, _NUMBERS_AT_ONCE // max(1, width))
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def sliced_loss(
    rows_NH: torch.Tensor,
    true_N: torch.Tensor,
    head: nn.Module,
    *,
    width: int,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the summed cross-entropy of what a head says of hidden states, a slice at a time.

    Of a frozen linear head, loss and gradient of a slice are computed in the forward pass, and
    nothing but the gradient with respect to `rows_NH` is kept; of any other, a slice is computed
    again going back.

    Args:
        rows_NH: Hidden states.
        true_N: The true token of each.
        head: Makes logits of them.
        width: V, by which slices are cut.
        label_smoothing: As in `torch.nn.functional.cross_entropy`.
    """
    parts = cut_rows(rows_NH, width)
    # Only this class is known to hold all its weights itself. With a scaler of the loss, gradients
    # must be scaled from the start.
    is_plain = type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())
    if is_plain and rows_NH.dtype != torch.float16 and not _is_autocast_fp16(rows_NH):
        found: torch.Tensor = _SlicedLoss.apply(rows_NH, true_N, head, parts, label_smoothing)
        return found

    def loss(part_NH: torch.Tensor, part_N: torch.Tensor) -> torch.Tensor:
        return _cross_entropy(head(part_NH), part_N, label_smoothing)

    if len(parts) <= 1:
        return loss(rows_NH, true_N)
    again = [checkpoint(loss, rows_NH[p], true_N[p], use_reentrant=False) for p in parts]
    return torch.stack(again).sum()


def _cross_entropy(
    logits_NV: torch.Tensor, true_N: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    precise = torch.promote_types(logits_NV.dtype, torch.float32)
    return functional.cross_entropy(
        logits_NV.to(precise), true_N, reduction="sum", label_smoothing=label_smoothing
    )


def _is_autocast_fp16(rows: torch.Tensor) -> bool:
    kind = rows.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16


class _SlicedLoss(torch.autograd.Function):
    """The loss of `sliced_loss` with its gradient, both computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_NH: torch.Tensor,
        true_N: torch.Tensor,
        head: nn.Module,
        parts: list[slice],
        label_smoothing: float,
    ) -> torch.Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        total = torch.zeros(
            (), device=rows_NH.device, dtype=torch.promote_types(rows_NH.dtype, torch.float32)
        )
        gradient_NH = torch.empty_like(rows_NH) if needs_gradient else None
        for part in parts:
            with torch.set_grad_enabled(needs_gradient):
                slice_CH = rows_NH[part].detach().requires_grad_(needs_gradient)
                loss = _cross_entropy(head(slice_CH), true_N[part], label_smoothing)
            if gradient_NH is not None:
                gradient_NH[part] = torch.autograd.grad(loss, slice_CH)[0]
            total += loss.detach()
        ctx.save_for_backward(gradient_NH)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_NH,) = ctx.saved_tensors
        return (gradient_NH * grad).to(gradient_NH.dtype), None, None, None, None
