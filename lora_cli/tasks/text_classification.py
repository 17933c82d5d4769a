"""Text classification: one label for each text, or for each pair of texts.

The head is the sequence classification head of transformers; `lora_cli.tasks.single_label` has the
loss.
"""

from collections.abc import Mapping
from typing import Any

from lora_cli.config.tasks import TextClassificationConfig
from lora_cli.tasks.single_label import SingleLabelFamily, SingleLabelTask
from lora_cli.tasks.texts import LABEL, TEXTS, TextFamily, TextReader


class TextClassification(TextFamily, SingleLabelFamily):
    """The family's row in the table."""

    auto_class = "AutoModelForSequenceClassification"
    task_type: str | None = "SEQ_CLS"
    inputs, targets = TEXTS, (LABEL,)

    def build(
        self, config: TextClassificationConfig, state: Mapping[str, Any], processor: Any
    ) -> SingleLabelTask:
        """Bind the family; `processor` is a tokenizer."""
        reader = TextReader(processor, state["columns"], max_length=config.max_length)
        return SingleLabelTask(config, state, reader)
