"""Causal language modelling: a decoder is trained further on plain text, such as that of a domain.

The loss is cross-entropy over all tokens of a text but the first (see `lora_cli.tasks.language`). A
text that is longer than `max_length` becomes several windows, each of which begins with the last
token of the one before, so that every token is learned once. What predict is given is rated and
continued.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_cli.config.language import CausalLanguageModelingConfig
from lora_cli.data.columns import TEXT_COLUMNS, check_texts
from lora_cli.data.files import ALL_LAYOUTS
from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row
from lora_cli.errors import Problem
from lora_cli.tasks.contract import Batch, Features, StepOutput
from lora_cli.tasks.generation import as_rows, as_tensor, generate, text_of
from lora_cli.tasks.language import (
    Score,
    collate_sequences,
    each_alone,
    next_token_loss,
    scores,
    supervised,
    training_lines,
)
from lora_cli.tasks.rows import Columns, Role, RowFamily, without_blank


@dataclass(frozen=True, slots=True)
class TextPrediction:
    """What a model says of one text.

    Attributes:
        id: Row id.
        score: How well its tokens are predicted.
        continuation: How the model goes on, where it was asked to.
    """

    id: str
    score: Score
    continuation: str | None


class CausalLanguageModelingTask:
    """Causal language modelling bound to a configuration, a column and a tokenizer."""

    couples_rows = False

    def __init__(
        self, config: CausalLanguageModelingConfig, state: Mapping[str, Any], tokenizer: Any
    ) -> None:
        self.metric: str = config.metric
        self.greater_is_better = config.metric != "perplexity"
        self._config = config
        self._column: str = state["columns"]["text"]
        self._is_continuing = bool(state.get("continuing"))
        self._tokenizer = tokenizer

    def encode(self, row: Row) -> Features:
        """Tokenize a text and cut it into windows.

        Returns:
            Besides what all features have, ``sequences``, the windows; where the text is to be
            continued, ``prompt``, its last tokens.
        """
        most, end = self._config.max_length, self._tokenizer.eos_token_id
        ids = list(self._tokenizer(row.values[self._column])["input_ids"])
        if ids and end is not None and ids[-1] == end:
            ids.pop()
        prompt = ids[-most:]
        if self._config.end_of_text and end is not None and not self._is_continuing:
            ids.append(end)
        windows = [ids[n : n + most] for n in range(0, max(1, len(ids) - 1), most - 1)]
        sequences = [{"input_ids": one, "spans": [[1, len(one)]]} for one in windows]
        features: Features = {
            "id": row.id,
            "length": sum(map(len, windows)),
            "cut": 0,
            "supervised": supervised(sequences),
            "sequences": sequences,
        }
        return {**features, "prompt": prompt} if self._is_continuing else features

    def collate(self, features: Sequence[Features]) -> Batch:
        """Stack the windows of all rows, each padded at its right to the longest."""
        batch = collate_sequences(features, padding=self._tokenizer.pad_token_id)
        return {**batch, "prompts": [row.get("prompt") for row in features]}

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return the loss of all tokens but the first of a window.

        The outputs are those of `next_token_loss`, and for texts that are to be continued
        ``continuations`` (B, G), generated tokens.
        """
        found = next_token_loss(model, batch)
        if not self._is_continuing:
            return found
        written = generate(
            model, self._tokenizer, batch["prompts"], self._config.generation, ids=batch["ids"]
        )
        tokens = as_tensor(written, device=batch["inputs"]["input_ids"].device)
        return StepOutput(found.loss_sum, found.count, {**found.outputs, "continuations": tokens})

    def decode(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> list[TextPrediction]:
        """Return one prediction a row."""
        texts: list[str | None] = [None] * len(batch["ids"])
        if "continuations" in outputs:
            rows = as_rows(outputs["continuations"])
            texts = [text_of(self._tokenizer, row, self._config.generation) for row in rows]
        found = zip(batch["ids"], scores(outputs, batch), texts, strict=True)
        return [TextPrediction(*one) for one in found]

    def metrics(self, predictions: Sequence[TextPrediction]) -> dict[str, float]:
        """Return perplexity and token_accuracy over the tokens of all rows."""
        from lora_cli.metrics.perplexity import token_metrics

        return token_metrics(
            [one.score.loss_sum for one in predictions],
            [one.score.hits for one in predictions],
            [one.score.count for one in predictions],
        )

    def report(self, predictions: Sequence[TextPrediction]) -> dict[str, Any]:
        """Return nothing: there are no classes."""
        del predictions
        return {}

    def to_json(self, prediction: TextPrediction) -> dict[str, Any]:
        """Return id, loss, perplexity and the number of tokens; the continuation if there is one.

        Loss and perplexity of a text of one token are null.
        """
        from lora_cli.metrics.perplexity import perplexity

        score = prediction.score
        known = score.count > 0
        line: dict[str, Any] = {
            "id": prediction.id,
            "loss": score.loss_sum / score.count if known else None,
            "perplexity": perplexity(score.loss_sum, score.count) if known else None,
            "tokens": score.count,
        }
        if prediction.continuation is not None:
            line["continuation"] = prediction.continuation
        return line


class CausalLanguageModeling(RowFamily):
    """The family's row in the table."""

    auto_class = "AutoModelForCausalLM"
    task_type: str | None = "CAUSAL_LM"
    inputs = (Role("text", TEXT_COLUMNS),)
    targets: tuple[Role, ...] = ()
    layouts = ALL_LAYOUTS

    def check_rows(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse rows without text."""
        return check_texts(rows, columns["text"] or "")

    def learn(
        self,
        config: CausalLanguageModelingConfig,
        train: Sequence[Row],
        loaded: Loaded,
        columns: Columns,
    ) -> dict[str, Any]:
        """Return nothing: the tokens are those of the tokenizer."""
        del config, train, loaded, columns
        return {}

    def describe(self, state: Mapping[str, Any]) -> str:
        """Return nothing."""
        del state
        return ""

    def model_options(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return nothing: the head has an output for each token of the vocabulary."""
        del state
        return {}

    def arrange(
        self, config: CausalLanguageModelingConfig, features: Sequence[Features], model: nn.Module
    ) -> tuple[list[Features], tuple[str, ...]]:
        """Put several texts into a row; without packing each window becomes one."""
        if not config.packing:
            return each_alone(features), ()
        return training_lines(features, model, max_length=config.max_length)

    def bind_columns(
        self, columns: Sequence[str], state: Mapping[str, Any], *, where: str
    ) -> Mapping[str, Any]:
        """Find the text among the columns of rows to continue."""
        return {**super().bind_columns(columns, state, where=where), "continuing": True}

    def build(
        self, config: CausalLanguageModelingConfig, state: Mapping[str, Any], processor: Any
    ) -> CausalLanguageModelingTask:
        """Bind the family; `processor` is a tokenizer."""
        return CausalLanguageModelingTask(config, state, processor)

    def _with_targets(
        self, loaded: Loaded, columns: Columns
    ) -> tuple[dict[str, tuple[Row, ...]], list[str]]:
        """Leave out blank texts, which files of running text have between paragraphs."""
        return without_blank(loaded, columns["text"] or "")
