"""What the families share that learn the next token of a sequence: batches, loss, packing.

A sequence is a dict of plain values: ``input_ids``, its tokens, and ``spans``, first token and
token after the last of the parts that are learned. Encoded rows hold ``sequences``; of a row that
is ``packed`` they stand behind each other in one line of the batch, else each has its own. The
first token of a sequence is never learned, since nothing comes before it.

The loss is cross-entropy, summed over the learned tokens: token t is predicted from the logits at
t - 1. Shapes: W lines of a batch, T tokens, V entries of the vocabulary, N learned tokens.
"""

import inspect
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_cli.tasks.contract import Batch, Features, StepOutput
from lora_cli.tasks.generation import unwrapped
from lora_cli.tasks.output_head import loss_at, own_and_best_at

Sequence_ = dict[str, Any]

# Tokens of a pass where nothing is learned, so that long texts fit into memory.
_TOKENS_AT_ONCE = 8192
# How far the logits of a text may be from those of it alone, for logits of size one.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_COARSE = 5e-2
_SAMPLE = 24


@dataclass(frozen=True, slots=True)
class Score:
    """How well the learned tokens of a row are predicted.

    Attributes:
        loss_sum: Sum of -log of their probabilities.
        hits: How many of them are the most probable token.
        count: How many there are.
    """

    loss_sum: float
    hits: int
    count: int


def supervised(sequences: Sequence[Sequence_]) -> int:
    """Return the number of learned tokens of some sequences."""
    return sum(end - max(start, 1) for one in sequences for start, end in one["spans"] if end > 1)


def collate_sequences(features: Sequence[Features], *, padding: int) -> Batch:
    """Stack the sequences of encoded rows, each line padded at its right to the longest.

    Returns:
        ``inputs`` of the model: ``input_ids`` and ``attention_mask``; for packed rows
        ``input_ids`` and ``position_ids``, which start again with each sequence, and with the
        padding, whereby transformers lets no token see those of another sequence (if it has no
        cache to fill). ``learned``, which tokens are to be predicted, and ``lines``, the number of
        lines of each row.
    """
    lines = [
        group
        for row in features
        for group in ([row["sequences"]] if row.get("packed") else [[s] for s in row["sequences"]])
    ]
    width = max((sum(len(one["input_ids"]) for one in line) for line in lines), default=0)
    shape = (len(lines), width)
    ids, mask = torch.full(shape, padding), torch.zeros(shape, dtype=torch.long)
    positions, learned = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for number, line in enumerate(lines):
        place = 0
        for one in line:
            length = len(one["input_ids"])
            ids[number, place : place + length] = torch.tensor(one["input_ids"])
            positions[number, place : place + length] = torch.arange(length)
            for start, end in one["spans"]:
                learned[number, place + max(start, 1) : place + end] = True
            place += length
        mask[number, :place] = 1
        positions[number, place:] = torch.arange(width - place)
    is_packed = any(row.get("packed") for row in features)
    given = {"position_ids": positions} if is_packed else {"attention_mask": mask}
    counts = [1 if row.get("packed") else len(row["sequences"]) for row in features]
    return {
        "ids": [row["id"] for row in features],
        "inputs": {"input_ids": ids, **given},
        "learned": learned,
        "lines": counts,
    }


def next_token_loss(
    model: Callable[..., Any],
    batch: Batch,
    *,
    more: Callable[[slice], Mapping[str, torch.Tensor]] = lambda _: {},
) -> StepOutput:
    """Return the loss of the learned tokens and their number.

    Outside of training the output ``log_probs`` (W, T, 2) holds of each learned token its own and
    the largest of another, 0 elsewhere.

    Args:
        model: A model with a language modelling head.
        batch: As `collate_sequences` made it.
        more: Returns what else the model is given for some lines, such as images, which are not as
            many as the lines.
    """
    inputs, learned_WT = batch["inputs"], batch["learned"]
    if "seed" in batch:
        whole = {**inputs, **more(slice(0, len(learned_WT)))}
        places_WT, true_N = _learned(inputs, learned_WT)
        loss_sum = loss_at(model, _without_cache(model, whole), places_WT, true_N)
        return StepOutput(loss_sum, len(true_N), {})
    said_WT2 = torch.zeros((*learned_WT.shape, 2), device=learned_WT.device)
    for lines in _slices(model, learned_WT.shape):
        part = {**{name: value[lines] for name, value in inputs.items()}, **more(lines)}
        places_WT, true_N = _learned(part, learned_WT[lines])
        said_N2 = own_and_best_at(model, _without_cache(model, part), places_WT, true_N)
        said_WT2[lines][:, 1:][learned_WT[lines][:, 1:]] = said_N2.to(said_WT2)
    return StepOutput(-said_WT2[..., 0].sum(), int(learned_WT.sum()), {"log_probs": said_WT2})


def scores(outputs: Mapping[str, torch.Tensor], batch: Batch) -> list[Score]:
    """Return how well the tokens of each row were predicted, from what `next_token_loss` gave."""
    said_WT2 = outputs["log_probs"].detach().double().cpu()
    learned_WT = batch["learned"].cpu()
    found, before = [], 0
    for lines in batch["lines"]:
        own = slice(before, before + lines)
        said_N2 = said_WT2[own][learned_WT[own]]
        hits = int((said_N2[:, 0] > said_N2[:, 1]).sum())
        found.append(Score(float(-said_N2[:, 0].sum()), hits, len(said_N2)))
        before += lines
    return found


def _learned(
    inputs: Mapping[str, torch.Tensor], learned_WT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the places (W, T) whose logits predict learned tokens, and these tokens, (N,)."""
    places_WT = learned_WT.roll(-1, dims=1)
    places_WT[:, -1:] = False
    return places_WT, inputs["input_ids"][:, 1:][learned_WT[:, 1:]]


def _without_cache(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return inputs that ask for no cache, where a model knows of one: nobody reads it here.

    Packed texts are kept apart only then, and recomputation in training warns of one.
    """
    can_do_without = hasattr(getattr(unwrapped(model), "config", None), "use_cache")
    if can_do_without or "position_ids" in inputs:
        return {**inputs, "use_cache": False}
    return dict(inputs)


def _slices(model: Any, shape: torch.Size) -> Iterator[slice]:
    """Yield the lines of each pass: all of them where processes must make the same passes."""
    lines, width = shape
    size = max(1, _TOKENS_AT_ONCE // max(1, width))
    if hasattr(model, "set_reshard_after_forward"):
        size = max(1, lines)
    for start in range(0, lines, size):
        yield slice(start, start + size)


def training_lines(
    features: Sequence[Features], model: nn.Module, *, max_length: int
) -> tuple[list[Features], tuple[str, ...]]:
    """Pack rows where the model keeps texts in one row apart; return them with a sentence on it."""
    reason = why_not_packed(model, features)
    if reason is not None:
        return each_alone(features), (f"not packed: {reason}",)
    lines, texts = pack(features, max_length=max_length), sum(len(r["sequences"]) for r in features)
    share = sum(line["length"] for line in lines) / (len(lines) * max_length)
    note = (
        f"packed: {texts:,} texts in {len(lines):,} rows of at most {max_length:,} tokens, "
        f"{100 * share:.1f} % full"
    )
    return lines, (note,)


def pack(features: Sequence[Features], *, max_length: int) -> list[Features]:
    """Put the sequences of rows together, so that few lines of at most `max_length` are needed.

    Each goes, longest first, where the least room is left that it fits into; none is cut. What is
    in a line has its id: those of the rows, in the order of the rows.
    """
    listed = [(row, one) for row in features for one in row["sequences"]]
    order = sorted(range(len(listed)), key=lambda n: (-len(listed[n][1]["input_ids"]), n))
    # (room left, number of the line), sorted.
    rooms: list[tuple[int, int]] = []
    lines: list[list[int]] = []
    for n in order:
        length = len(listed[n][1]["input_ids"])
        place = bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, line = rooms.pop(place)
        else:
            room, line = max_length, len(lines)
            lines.append([])
        lines[line].append(n)
        insort(rooms, (room - length, line))
    return [_line([listed[n] for n in sorted(line)]) for line in sorted(map(sorted, lines))]


def _line(members: Sequence[tuple[Features, Sequence_]]) -> Features:
    rows = {row["id"]: row for row, _ in members}
    sequences = [one for _, one in members]
    return {
        "id": "+".join(rows),
        "sequences": sequences,
        "packed": True,
        "length": sum(len(one["input_ids"]) for one in sequences),
        "cut": sum(row["cut"] for row in rows.values()),
        "supervised": supervised(sequences),
    }


def each_alone(features: Sequence[Features]) -> list[Features]:
    """Return a row for each sequence, so that a long text is not one large row of a batch."""
    found = []
    for row in features:
        for number, one in enumerate(row["sequences"]):
            own = row["id"] if len(row["sequences"]) == 1 else f"{row['id']}/{number}"
            length = len(one["input_ids"])
            found.append(
                {**row, "id": own, "sequences": [one], "length": length, "supervised": 0}
                | {"supervised": supervised([one])}
            )
    return found


def why_not_packed(model: nn.Module, features: Sequence[Features]) -> str | None:
    """Say why texts in one line of a batch would see each other in this model; None if not so.

    Two texts are run in one line. What is said of the second must not depend on the first, and must
    be what is said of it alone.

    Args:
        model: A model with a language modelling head, in evaluation mode.
        features: Encoded rows.
    """
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{name} takes no positions"
    texts = [one["input_ids"][:_SAMPLE] for row in features[:8] for one in row["sequences"]]
    texts = [text for text in texts if len(text) > 1][:2]
    if len(texts) < 2:
        return None
    first, second = texts
    others = [first[0], *([second[-1]] * (len(first) - 1))]
    alone = _logits(model, [second])
    packed = _logits(model, [first, second])[len(first) :]
    beside_others = _logits(model, [others, second])[len(first) :]
    size = max(1.0, float(alone.abs().max()))
    dtype = next(model.parameters()).dtype
    tolerance = _TOLERANCE.get(dtype, _COARSE) * size
    if float((packed - beside_others).abs().max()) > tolerance:
        return f"texts in one row see each other in {name}"
    if float((packed - alone).abs().max()) > tolerance:
        return f"{name} does not count the positions of each text by itself"
    return None


def _logits(model: nn.Module, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the logits (T, V) of texts in one line."""
    sequences = [{"input_ids": text, "spans": []} for text in texts]
    row = {"id": "", "sequences": sequences, "packed": True}
    inputs = collate_sequences([row], padding=0)["inputs"]
    device = next(model.parameters()).device
    with torch.inference_mode():
        inputs = {name: value.to(device) for name, value in inputs.items()}
        found: torch.Tensor = model(**_without_cache(model, inputs)).logits
    return found[0].float()
