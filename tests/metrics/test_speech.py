"""Error rates of speech, counted by hand."""

import pytest

from lora_cli.metrics.speech import speech_metrics


@pytest.mark.parametrize(
    ("found", "references", "wer", "cer"),
    [
        (["a b c"], ["a b c"], 0, 0),
        (["a x c"], ["a b c"], 1 / 3, 1 / 5),
        ([""], ["a b"], 1, 1),
        # Over all texts at once: 2 of 4 words.
        (["a", "b c x y"], ["a", "b c z"], 2 / 4, 3 / 6),
        ([], [], 0, 0),
    ],
)
def test_errors_are_counted(
    found: list[str], references: list[str], wer: float, cer: float
) -> None:
    assert speech_metrics(found, references) == pytest.approx({"wer": wer, "cer": cer})
