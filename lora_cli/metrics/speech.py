"""How near recognized texts are to what was said: the error rates of words and characters.

Both are counted by jiwer: substitutions, deletions and insertions over all texts at once, by the
number of words, or characters, of the references. 0 is best, and more than 1 is possible.
"""

from collections.abc import Sequence


def speech_metrics(found: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return ``wer`` and ``cer``; 0 where there are no references.

    Args:
        found: Recognized texts, normalized.
        references: What was said, normalized, none of them empty.
    """
    if not references:
        return {"wer": 0.0, "cer": 0.0}
    import jiwer

    return {
        "wer": float(jiwer.wer(list(references), list(found))),
        "cer": float(jiwer.cer(list(references), list(found))),
    }
