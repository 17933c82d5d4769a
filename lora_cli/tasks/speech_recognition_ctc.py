"""Speech recognition by letters, with connectionist temporal classification (CTC).

The model says a letter or a blank at each moment, every 20 ms for wav2vec 2.0, and the loss of a
row is ``-log p(letters | sound)``, summed over all ways to place the letters in time (Graves et al.
2006): ``loss_sum`` is the sum over rows, and ``count`` the number of their letters, spaces among
them. A row with more letters than moments cannot be said and counts as none.

The letters are those of the normalized transcripts of train, in order of their code points, after
the blank, one for unknown letters, and the space.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2Processor

from lora_cli.config.audio import SpeechRecognitionCTCConfig
from lora_cli.data.sources import Loaded
from lora_cli.data.transcripts import (
    BLANK,
    SPACE,
    UNKNOWN,
    build_vocabulary,
    normalize,
    read_spelling,
    spell,
)
from lora_cli.data.types import Row
from lora_cli.models.sources import ModelSource
from lora_cli.tasks.contract import Batch, Features, StepOutput
from lora_cli.tasks.rows import Columns, raise_if
from lora_cli.tasks.speech import SpeechReader, best_path, pad_frames
from lora_cli.tasks.spoken import SpokenFamily, without_long

_VOCABULARY = "vocab.json"


@dataclass(frozen=True, slots=True)
class SpeechPrediction:
    """What was recognized in one row.

    Attributes:
        id: Row id.
        words: Each with the seconds at which it starts and ends.
        reference: The transcript, normalized, or None where it is not known.
    """

    id: str
    words: tuple[tuple[str, float, float], ...]
    reference: str | None

    @property
    def text(self) -> str:
        """The words with spaces between."""
        return " ".join(word for word, _, _ in self.words)


class SpeechRecognitionCTCTask:
    """Speech recognition bound to a configuration, a vocabulary and a reader."""

    greater_is_better = False
    couples_rows = False

    def __init__(self, config: Any, state: Mapping[str, Any], reader: SpeechReader) -> None:
        self.metric: str = config.metric
        self._how: str = config.normalizer
        self._vocabulary: list[str] = state["vocabulary"]
        self._column: str | None = state["columns"]["text"]
        self._reader = reader

    def encode(self, row: Row) -> Features:
        """Encode a row; `text` is None where the transcript is not known."""
        found = self._reader.encode(row)
        if self._column is None:
            return {**found, "text": None}
        text = normalize(row.values[self._column], self._how)
        return {**found, "text": text, "supervised": len(text)}

    def collate(self, features: Sequence[Features]) -> Batch:
        """Put rows together: places of sounds, and `texts`, or None."""
        texts = [row["text"] for row in features]
        return {
            "ids": [row["id"] for row in features],
            "texts": None if None in texts else texts,
            **self._reader.collate(features),
        }

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return loss, number of letters, `logits` (B, F, V) and `frames`, their number a row."""
        logits_BFV, frames = pad_frames(self._reader.logits(batch, model))
        outputs = {"logits": logits_BFV, "frames": frames}
        if batch["texts"] is None:
            return StepOutput(logits_BFV.new_zeros(()), 0, outputs)
        labels = [spell(text, self._vocabulary) for text in batch["texts"]]
        loss_sum, count = ctc_loss(logits_BFV, frames, labels)
        return StepOutput(loss_sum, count, outputs)

    def decode(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> list[SpeechPrediction]:
        """Take the best letter at each moment."""
        texts = batch["texts"] or [None] * len(batch["ids"])
        found = []
        for row, (row_id, text) in enumerate(zip(batch["ids"], texts, strict=True)):
            frames = int(outputs["frames"][row])
            moment = batch["lengths"][row] / self._reader.rate / frames
            words = read_spelling(best_path(outputs["logits"][row, :frames]), self._vocabulary)
            times = tuple(
                (word, round(start * moment, 3), round((end + 1) * moment, 3))
                for word, start, end in words
            )
            found.append(SpeechPrediction(row_id, times, text))
        return found

    def metrics(self, predictions: Sequence[SpeechPrediction]) -> dict[str, float]:
        """Return wer and cer."""
        from lora_cli.metrics.speech import speech_metrics

        known = [(row.text, row.reference) for row in predictions if row.reference is not None]
        return speech_metrics([text for text, _ in known], [reference for _, reference in known])

    def report(self, predictions: Sequence[SpeechPrediction]) -> dict[str, Any]:
        """Return nothing: the metrics say it all."""
        del predictions
        return {}

    def to_json(self, prediction: SpeechPrediction) -> dict[str, Any]:
        """Return id, text and words with their times, and the reference if known."""
        line: dict[str, Any] = {
            "id": prediction.id,
            "text": prediction.text,
            "words": [
                {"word": word, "start": start, "end": end} for word, start, end in prediction.words
            ],
        }
        if prediction.reference is not None:
            line["reference"] = prediction.reference
        return line


def ctc_loss(
    logits_BFV: torch.Tensor, frames: torch.Tensor, labels: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, int]:
    """Return the summed loss and the number of labels of the rows that can be said.

    Args:
        logits_BFV: Of each moment; number 0 is the blank.
        frames: Moments of each row.
        labels: Numbers of the letters of each row. Equal neighbours need a blank between them.
    """
    needed = [len(row) + sum(a == b for a, b in pairwise(row)) for row in labels]
    rows = [row for row, least in enumerate(needed) if least <= int(frames[row])]
    if not rows:
        return logits_BFV.sum() * 0, 0
    chosen = [labels[row] for row in rows]
    sizes = torch.tensor([len(row) for row in chosen])
    loss_sum = functional.ctc_loss(
        logits_BFV[rows].log_softmax(-1).transpose(0, 1),
        torch.tensor([number for row in chosen for number in row], device=logits_BFV.device),
        frames[rows],
        sizes,
        reduction="sum",
    )
    return loss_sum, int(sizes.sum())


class SpeechRecognitionCTC(SpokenFamily):
    """A row in the table of families; the state holds ``vocabulary``."""

    auto_class = "AutoModelForCTC"

    def learn(
        self, config: Any, train: Sequence[Row], loaded: Loaded, columns: Columns
    ) -> dict[str, Any]:
        """Return ``vocabulary``.

        Raises:
            UserError: If nothing is left of some transcripts.
        """
        del loaded
        raise_if(self.check_evaluated(config, train, columns))
        texts = [normalize(row.values[columns["text"] or ""], config.normalizer) for row in train]
        return {"vocabulary": build_vocabulary(texts)}

    def describe(self, state: Mapping[str, Any]) -> str:
        """Return the number of letters."""
        return f"{len(state['vocabulary']) - 3} letters"

    def arrange(
        self, config: Any, features: Sequence[Features], model: nn.Module
    ) -> tuple[Sequence[Features], tuple[str, ...]]:
        """Leave out what is too long to be trained on."""
        del model
        kept = [row for row in features if row["measures"]["seconds"] <= config.max_seconds]
        return without_long(
            features,
            kept,
            limit=f"task.max_seconds={config.max_seconds}",
            key="task.max_seconds",
            fix="cut the recordings at pauses, or raise task.max_seconds",
        )

    def model_options(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the size of the head, and its blank."""
        return {"vocab_size": len(state["vocabulary"]), "pad_token_id": 0}

    def check_head(self, source: ModelSource, state: Mapping[str, Any]) -> tuple[bool, str]:
        """Compare the letters of the base's own vocabulary with those of train."""
        try:
            numbers = json.loads((source.folder / _VOCABULARY).read_bytes())
            letters = sorted(numbers, key=numbers.__getitem__)
        except (OSError, ValueError, TypeError, AttributeError):
            letters = []
        if letters == state["vocabulary"]:
            return True, "head: that of the base is kept, whose letters are those of train"
        return False, "head: new, since that of the base says other letters than those of train"

    def fit_model(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Leave the model as it is: it reads sounds as long as they are."""
        del model, state

    def fit_processor(self, processor: Any, state: Mapping[str, Any]) -> Any:
        """Return a processor with a tokenizer for the vocabulary, beside the feature extractor."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / _VOCABULARY
            numbers = {letter: number for number, letter in enumerate(state["vocabulary"])}
            path.write_text(json.dumps(numbers, ensure_ascii=False), encoding="utf-8")
            tokenizer = Wav2Vec2CTCTokenizer(
                str(path),
                pad_token=BLANK,
                unk_token=UNKNOWN,
                word_delimiter_token=SPACE,
                bos_token=None,
                eos_token=None,
            )
        return Wav2Vec2Processor(feature_extractor=processor, tokenizer=tokenizer)

    def build(
        self, config: SpeechRecognitionCTCConfig, state: Mapping[str, Any], processor: Any
    ) -> SpeechRecognitionCTCTask:
        """Bind the family; `processor` is one with a feature extractor."""
        reader = SpeechReader(
            processor.feature_extractor,
            state,
            augmentation=config.augmentation,
            chunk=config.max_seconds,
            stride=config.stride_seconds,
        )
        return SpeechRecognitionCTCTask(config, state, reader)
