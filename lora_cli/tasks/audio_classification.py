"""Audio classification: one label for each sound.

The head is that of transformers for sounds: a mean over time and a linear layer, or what the
architecture has. `lora_cli.tasks.single_label` has the loss.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lora_cli.config.audio import AudioClassificationConfig
from lora_cli.models.time_masks import seeded_masks
from lora_cli.tasks.audio import AudioFamily, AudioReader
from lora_cli.tasks.contract import Batch
from lora_cli.tasks.single_label import LabelPrediction, SingleLabelFamily, SingleLabelTask
from lora_cli.tasks.texts import LABEL


class AudioClassificationTask(SingleLabelTask):
    """Audio classification bound to a configuration, label names and a reader."""

    def __init__(self, config: Any, state: Mapping[str, Any], reader: AudioReader) -> None:
        super().__init__(config, state, reader)
        self._sounds = reader

    def metrics(self, predictions: Sequence[LabelPrediction]) -> dict[str, float]:
        """Return accuracy and macro_f1."""
        found = super().metrics(predictions)
        return {name: found[name] for name in ("accuracy", "macro_f1")}

    def _logits(self, model: Callable[..., Any], batch: Batch) -> torch.Tensor:
        """Run the model, on rows of one length at a time where it must be so."""
        order: list[int] = []
        found = []
        for rows, inputs in self._sounds.parts(batch, model):
            ids = [batch["ids"][row] for row in rows]
            longest = max(batch["lengths"][row] for row in rows)
            with seeded_masks(model, seed=batch.get("seed"), ids=ids, samples=longest):
                found.append(model(**inputs).logits.float())
            order += rows
        return torch.cat(found)[torch.tensor(order).argsort()]


class AudioClassification(AudioFamily, SingleLabelFamily):
    """A row in the table of families: one label a sound."""

    auto_class = "AutoModelForAudioClassification"
    task_type: str | None = None
    targets = (LABEL,)

    def describe(self, state: Mapping[str, Any]) -> str:
        """Return the number of labels, and how much is read of each sound."""
        return f"{super().describe(state)}, at most {state['seconds']} s of each sound are read"

    def build(
        self, config: AudioClassificationConfig, state: Mapping[str, Any], processor: Any
    ) -> AudioClassificationTask:
        """Bind the family; `processor` is a feature extractor."""
        reader = AudioReader(processor, state, augmentation=config.augmentation)
        return AudioClassificationTask(config, state, reader)
