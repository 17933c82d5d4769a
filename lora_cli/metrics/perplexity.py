"""How well tokens are predicted."""

import math
from collections.abc import Sequence

# exp of more is no finite number; a mean as large means nothing but that the model is broken.
_LARGEST = 700.0


def perplexity(loss_sum: float, count: int) -> float:
    """Return exp(loss_sum / count): how many tokens a model hesitates between, on average.

    Args:
        loss_sum: Sum of -log of the probabilities that true tokens were given.
        count: Number of these tokens; of none it is 1.

    >>> round(perplexity(2 * math.log(8), 2), 6)
    8.0
    """
    return math.exp(min(loss_sum / count, _LARGEST)) if count else 1.0


def masked_metrics(
    losses: Sequence[float], hits: Sequence[int], counts: Sequence[int]
) -> dict[str, float]:
    """Return ``perplexity`` and ``accuracy``, the share of tokens predicted right, over all tokens.

    Args:
        losses: Of each row the sum of -log of the probabilities of its true tokens.
        hits: Of each row the tokens predicted right.
        counts: Of each row all tokens that were to be predicted.
    """
    count = sum(counts)
    return {
        "perplexity": perplexity(math.fsum(losses), count),
        "accuracy": sum(hits) / count if count else 0.0,
    }


def token_metrics(
    losses: Sequence[float], hits: Sequence[int], counts: Sequence[int]
) -> dict[str, float]:
    """Return what `masked_metrics` does, ``perplexity`` and ``token_accuracy``, of next tokens."""
    found = masked_metrics(losses, hits, counts)
    return {"perplexity": found["perplexity"], "token_accuracy": found["accuracy"]}
