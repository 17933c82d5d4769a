"""Texts that a model writes for rows, beside those that were wanted: outputs, metrics and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_cli.config.generation import GenerationConfig
from lora_cli.tasks.contract import Batch
from lora_cli.tasks.generation import as_rows, as_tensor, text_of
from lora_cli.tasks.language import Score, scores


@dataclass(frozen=True, slots=True)
class WrittenText:
    """What a model says of one row.

    Attributes:
        id: Row id.
        text: What it writes; None where it was not asked to.
        is_ended: Whether the text ended by itself, not at `max_new_tokens`; None without a text.
        score: How well the tokens of the target are predicted; None where they are not known.
        references: The texts that were wanted; none where they are not known.
    """

    id: str
    text: str | None
    is_ended: bool | None
    score: Score | None
    references: tuple[str, ...]


def written_outputs(
    written: Sequence[Sequence[int]], ended: Sequence[bool], *, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return what `written_texts` reads: ``texts`` (B, G), tokens, and ``ended`` (B,), bool."""
    return {
        "texts": as_tensor(written, device=device),
        "ended": torch.tensor(list(ended), dtype=torch.bool, device=device),
    }


def written_texts(
    tokenizer: Any, outputs: Mapping[str, torch.Tensor], batch: Batch, config: GenerationConfig
) -> list[WrittenText]:
    """Return one prediction for each of ``batch["rows"]``, whose ``references`` are the texts."""
    rows = batch["rows"]
    known = scores(outputs, batch) if "log_probs" in outputs else [None] * len(rows)
    texts: list[str | None] = [None] * len(rows)
    ended: list[bool | None] = [None] * len(rows)
    if "texts" in outputs:
        texts = [text_of(tokenizer, one, config) for one in as_rows(outputs["texts"])]
        ended = outputs["ended"].tolist()
    return [
        WrittenText(row["id"], text, is_ended, score, tuple(row.get("references", ())))
        for row, text, is_ended, score in zip(rows, texts, ended, known, strict=True)
    ]


def written_metrics(
    predictions: Sequence[WrittenText], *, tokenizer: str = "auto"
) -> dict[str, float]:
    """Return perplexity and token_accuracy of the targets, and how near the texts are to them.

    The latter are bleu, chrf, ROUGE and exact_match (see `lora_cli.metrics.generation`) and
    ``ended``, the share of the texts that ended by themselves.
    """
    pairs, found = compared_texts(predictions), score_metrics(predictions)
    if pairs:
        from lora_cli.metrics.generation import generation_metrics

        found |= generation_metrics(
            [text for text, _ in pairs], [wanted for _, wanted in pairs], tokenizer=tokenizer
        )
        found["ended"] = share_ended(predictions)
    return found


def score_metrics(predictions: Sequence[WrittenText]) -> dict[str, float]:
    """Return perplexity and token_accuracy of the targets."""
    from lora_cli.metrics.perplexity import token_metrics

    known = [one.score for one in predictions if one.score is not None]
    return token_metrics(
        [one.loss_sum for one in known],
        [one.hits for one in known],
        [one.count for one in known],
    )


def compared_texts(predictions: Sequence[WrittenText]) -> list[tuple[str, tuple[str, ...]]]:
    """Return the texts that were written, each with what was wanted, where both are known."""
    return [
        (one.text, one.references) for one in predictions if one.text is not None and one.references
    ]


def share_ended(predictions: Sequence[WrittenText]) -> float:
    """Return the share of the compared texts that ended by themselves; there must be some."""
    ends = [one.is_ended for one in predictions if one.text is not None and one.references]
    return sum(map(bool, ends)) / len(ends)
