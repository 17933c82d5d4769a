"""What a language model says at some places only, and the loss there, without the logits of all.

The head of a language model, its output layer, turns a hidden state into scores of all V tokens of
the vocabulary. Most places of a batch are padding, prompt or unmasked, and nobody reads what is
said there. So the hidden states of the places that are read are cut out before the head, by a hook
on it, and the model goes on with these alone. Where what the model returns is what its head gave,
unchanged, the head is run on a slice of them at a time, and no tensor of N x V numbers is made.

Which of this a model allows is found out once, from one line of the first batch: random scores are
put in the place of what the head gave, and looked for in what the model returns. Images are left
out of it.

Shapes: W lines of T tokens, N places that are read, H hidden units, V entries of the vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lora_cli.log import logger
from lora_cli.tasks.generation import unwrapped
from lora_cli.tasks.token_loss import cut_rows, own_and_best, sliced_loss

Inputs = Mapping[str, Any]
Rows = Callable[[torch.Tensor], torch.Tensor]
# Given the head, or what takes its place, N rows for it, and V.
Reader = Callable[[nn.Module, torch.Tensor, int], torch.Tensor]

# Far from zero, so that what a model does to its scores shows, such as capping them at 30.
_SPREAD = 40.0
# Tokens of the line that this is found out with.
_SAMPLE = 16
# What a model that is not made for texts alone may run into.
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError)
# Inputs with something for each token.
_OF_TOKENS = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "decoder_input_ids",
    "decoder_attention_mask",
}


@dataclass(frozen=True, slots=True)
class HeadUse:
    """How the head of a model may be used.

    Attributes:
        kind: "slices" where what it gives is what the model returns; "rows" where the model still
            does something to it, place by place; "whole" where neither was found to be so.
        width: V, or 0 where it is not known.
    """

    kind: Literal["slices", "rows", "whole"]
    width: int = 0


_WHOLE = HeadUse("whole")
_KNOWN: WeakKeyDictionary[nn.Module, HeadUse] = WeakKeyDictionary()


def loss_at(
    model: Any,
    inputs: Inputs,
    places_WT: torch.Tensor,
    true_N: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the summed cross-entropy of the tokens that are true at some places, float32.

    Args:
        model: Any callable that returns `logits` (W, T, V) for `inputs`.
        inputs: Its keyword arguments.
        places_WT: Which logits are read.
        true_N: The tokens there, in the order of the places.
        label_smoothing: As in `torch.nn.functional.cross_entropy`.
    """

    def read(head: nn.Module, rows_NX: torch.Tensor, width: int) -> torch.Tensor:
        true = true_N.to(rows_NX.device)
        return sliced_loss(rows_NX, true, head, width=width, label_smoothing=label_smoothing)

    return read_at(model, inputs, places_WT, read)


def own_and_best_at(
    model: Any, inputs: Inputs, places_WT: torch.Tensor, true_N: torch.Tensor
) -> torch.Tensor:
    """Return the log-probabilities of true tokens and of the best other ones, (N, 2), float32."""

    def read(head: nn.Module, rows_NX: torch.Tensor, width: int) -> torch.Tensor:
        true, parts = true_N.to(rows_NX.device), cut_rows(rows_NX, width)
        found = [own_and_best(head(rows_NX[part]), true[part]) for part in parts]
        return torch.cat(found) if found else rows_NX.new_zeros((0, 2), dtype=torch.float32)

    return read_at(model, inputs, places_WT, read)


def logits_at(model: Any, inputs: Inputs, places_WT: torch.Tensor) -> torch.Tensor:
    """Return the logits (N, V) at some places."""
    return read_at(model, inputs, places_WT, lambda head, rows_NX, _: head(rows_NX))


def read_at(model: Any, inputs: Inputs, places_WT: torch.Tensor, read: Reader) -> torch.Tensor:
    """Run a model, and return what `read` makes of some places.

    Args:
        model: Any callable that returns `logits` (W, T, V) for `inputs`.
        inputs: Its keyword arguments.
        places_WT: Which places.
        read: Given the head and the hidden states there (N, H), from which the head makes logits;
            or, where the head cannot be used by itself, the identity and the logits (N, V).
            Given V as well.
    """
    head = head_of(model)
    use = _WHOLE if head is None else _use_of(head, model, inputs)
    if head is None or use.kind == "whole":
        logits_WTV = model(**inputs).logits
        logits_NV = logits_WTV[places_WT.to(logits_WTV.device)]
        return read(nn.Identity(), logits_NV, logits_NV.shape[-1])
    # A head that is spread over processes is whole within the pass of the model alone.
    if use.kind == "rows" or hasattr(unwrapped(model), "set_reshard_after_forward"):
        with _only_at(head, places_WT):
            return read(nn.Identity(), model(**inputs).logits[0], use.width)
    found: list[torch.Tensor] = []

    def take(rows_NH: torch.Tensor) -> torch.Tensor:
        found.append(read(head, rows_NH, use.width))
        # The model itself goes on with no place at all.
        return rows_NH[:0]

    with _only_at(head, places_WT, then=take):
        model(**inputs)
    return found[0]


def head_of(model: Any) -> nn.Module | None:
    """Return the output layer of a model, None where it does not tell of one."""
    plain = unwrapped(model)
    if not isinstance(plain, nn.Module) or not hasattr(plain, "get_output_embeddings"):
        return None
    try:
        head: Any = plain.get_output_embeddings()  # type: ignore[operator]  # of transformers
    except NotImplementedError:
        return None
    return head if isinstance(head, nn.Module) else None


@contextmanager
def _only_at(
    head: nn.Module, places_WT: torch.Tensor, then: Rows = lambda rows: rows
) -> Iterator[list[torch.Size]]:
    """Within, the head is given what `then` makes of its rows at some places, as one line.

    Yields:
        The shapes (W, T) that the head was used for, one for each time.
    """
    shapes: list[torch.Size] = []
    is_busy = False

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal is_busy
        if is_busy:
            return None
        is_busy = True
        try:
            hidden_WTH: torch.Tensor = args[0]
            shapes.append(hidden_WTH.shape[:-1])
            if hidden_WTH.shape[:-1] != places_WT.shape:
                return None
            rows_NH = hidden_WTH[places_WT.to(hidden_WTH.device)]
            return (then(rows_NH).unsqueeze(0), *args[1:])
        finally:
            is_busy = False

    handle = head.register_forward_pre_hook(select)
    try:
        yield shapes
    finally:
        handle.remove()


def _use_of(head: nn.Module, model: Any, inputs: Inputs) -> HeadUse:
    """Return how the head may be used, which is found out when a model is first met."""
    if head not in _KNOWN:
        with _evaluating(unwrapped(model)), torch.no_grad():
            _KNOWN[head] = _find_use(head, model, inputs)
        if _KNOWN[head].kind == "whole":
            logger.info(
                "the logits of all tokens are computed: %s", type(unwrapped(model)).__name__
            )
    return _KNOWN[head]


def _find_use(head: nn.Module, model: Any, inputs: Inputs) -> HeadUse:
    """Put random scores in the place of the head's, and see what the model makes of them."""
    tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    tokens = {name: x[:1, :_SAMPLE] for name, x in tensors.items() if name in _OF_TOKENS}
    shape = tokens.get("decoder_input_ids", tokens.get("input_ids", torch.empty(0))).shape
    if len(shape) != 2:
        return _WHOLE
    # Without images: what is found must not depend on whether the first batch had any.
    line = {**{name: x for name, x in inputs.items() if name not in tensors}, **tokens}
    try:
        return _find_use_in(line, head, model, shape)
    except _FAILURES:
        if tokens.keys() == tensors.keys():
            raise
        return _WHOLE


def _find_use_in(line: Inputs, head: nn.Module, model: Any, shape: torch.Size) -> HeadUse:
    every_T = torch.ones(shape, dtype=torch.bool)
    some_T = every_T.clone()
    some_T[:, 1::2] = False
    given, found = _probe(head, model, line, some_T)
    if found is None:
        return _WHOLE
    if torch.equal(found, given) and not head._forward_pre_hooks:
        return HeadUse("slices", given.shape[-1])
    _, all_found = _probe(head, model, line, every_T)
    if all_found is not None and torch.equal(all_found[some_T[0]], found):
        return HeadUse("rows", given.shape[-1])
    return _WHOLE


def _probe(
    head: nn.Module, model: Any, inputs: Inputs, places_WT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return random scores (N, V), the same ones for a place, and the logits that follow.

    These are None where the model does not use its head once, for the places of its inputs.
    """
    scores = torch.empty(0)

    def replace(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        nonlocal scores
        draw = torch.Generator().manual_seed(0)
        drawn_WTV = _SPREAD * torch.randn(*places_WT.shape, output.shape[-1], generator=draw)
        scores = drawn_WTV[places_WT].to(output)
        return scores.unsqueeze(0)

    with _only_at(head, places_WT) as shapes:
        handle = head.register_forward_hook(replace)
        try:
            logits = model(**inputs).logits
        finally:
            handle.remove()
    if shapes != [places_WT.shape] or logits.shape[:2] != (1, len(scores)):
        return scores, None
    # Accelerate gives back in float32 what was computed in less.
    return scores.to(logits.dtype), logits[0]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
