"""Token classification: a tag for each word of a text (entities, parts of speech, chunks).

The head is the token classification head of transformers. A word is read, and learned, at its first
token; the loss is cross-entropy, summed over the words of a batch:
``loss_sum = -sum_w log softmax(logits_BTC at the first token of w)[tag_w]``, ``count`` is their
number.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lora_cli.config.tasks import TokenClassificationConfig
from lora_cli.data import made_up
from lora_cli.data.columns import TEXT_COLUMNS, check_texts
from lora_cli.data.files import WORD_LAYOUTS
from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row
from lora_cli.data.words import (
    Span,
    check_tags,
    check_words,
    join_words,
    split_words,
    tags_of,
    words_of,
)
from lora_cli.errors import Problem, UserError
from lora_cli.tasks.contract import Batch, Features, StepOutput
from lora_cli.tasks.labels import LabelFamily, indices_of
from lora_cli.tasks.rows import Columns, Role, raise_if
from lora_cli.tasks.texts import pad_inputs

# What the loss passes over: cross_entropy's own default.
_IGNORED = -100


@dataclass(frozen=True, slots=True)
class TagsPrediction:
    """The tags of one row.

    Attributes:
        id: Row id.
        text: The text of the row, or its words as one.
        spans: Where each word is in the text, counted in characters.
        tags: Index of the tag of each word; None for words behind the limit of tokens.
        reference: Index of the true tag of each word, or None where they are not known.
    """

    id: str
    text: str
    spans: tuple[Span, ...]
    tags: tuple[int | None, ...]
    reference: tuple[int, ...] | None


class TokenClassificationTask:
    """Token classification bound to a configuration, tag names and a tokenizer."""

    greater_is_better = True
    couples_rows = False

    def __init__(
        self, config: TokenClassificationConfig, state: Mapping[str, Any], tokenizer: Any
    ) -> None:
        self.metric: str = config.metric
        self._max_length = config.max_length
        self._names: tuple[str, ...] = tuple(state["labels"])
        self._has_entities: bool = state["entities"]
        self._columns: Columns = state["columns"]
        self._indices = indices_of(state)
        self._tokenizer = tokenizer
        self._needs_space = _needs_space(tokenizer)

    def encode(self, row: Row) -> Features:
        """Tokenize the words; `firsts` is the place of the first token of each, None if cut."""
        column = self._columns["tokens"]
        words: Sequence[str]
        if column is None:
            text = row.values[self._columns["text"] or ""]
            words, spans = split_words(text)
        else:
            words = words_of(row.values[column]) or ()
            text, spans = join_words(words)
        if self._needs_space:
            ends = (0, *(end for _, end in spans))
            words = [text[end:last] for end, (_, last) in zip(ends, spans, strict=False)]
        inputs = self._tokenizer(list(words), is_split_into_words=True)
        whole = len(inputs["input_ids"])
        length = min(whole, self._max_length)
        if length < whole:
            inputs = self._tokenizer(
                list(words), is_split_into_words=True, truncation=True, max_length=length
            )
        firsts: list[int | None] = [None] * len(words)
        for place, word in enumerate(inputs.word_ids()):
            if word is not None and firsts[word] is None:
                firsts[word] = place
        tags = self._columns["tags"]
        return {
            "id": row.id,
            "inputs": dict(inputs),
            "length": length,
            "cut": whole - length,
            "supervised": sum(place is not None for place in firsts),
            "text": text,
            "spans": spans,
            "firsts": firsts,
            "tags": None
            if tags is None
            else [self._indices[tag] for tag in tags_of(row.values[tags]) or ()],
        }

    def collate(self, features: Sequence[Features]) -> Batch:
        """Pad to the longest row: `inputs` and `labels` (B, T), -100 beside first tokens."""
        inputs = pad_inputs(self._tokenizer, features)
        labels_BT = None
        if all(row["tags"] is not None for row in features):
            labels_BT = torch.full_like(inputs["input_ids"], _IGNORED)
            for labels_T, row in zip(labels_BT, features, strict=True):
                for place, tag in zip(row["firsts"], row["tags"], strict=True):
                    if place is not None:
                        labels_T[place] = tag
        return {
            "ids": [row["id"] for row in features],
            "inputs": inputs,
            "labels": labels_BT,
            "rows": list(features),
        }

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return the cross-entropy, the number of words and `logits` of shape (B, T, C)."""
        logits_BTC = model(**batch["inputs"]).logits.float()
        labels_BT = batch["labels"]
        if labels_BT is None:
            return StepOutput(logits_BTC.new_zeros(()), 0, {"logits": logits_BTC})
        loss_sum = functional.cross_entropy(
            logits_BTC.flatten(0, 1),
            labels_BT.flatten(),
            reduction="sum",
            ignore_index=_IGNORED,
            label_smoothing=batch.get("label_smoothing", 0.0),
        )
        return StepOutput(loss_sum, int((labels_BT != _IGNORED).sum()), {"logits": logits_BTC})

    def decode(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> list[TagsPrediction]:
        """Turn logits into the tag of each word."""
        best_BT = outputs["logits"].argmax(dim=-1).tolist()
        return [
            TagsPrediction(
                id=row["id"],
                text=row["text"],
                spans=tuple(row["spans"]),
                tags=tuple(None if place is None else best[place] for place in row["firsts"]),
                reference=None if row["tags"] is None else tuple(row["tags"]),
            )
            for row, best in zip(batch["rows"], best_BT, strict=True)
        ]

    def metrics(self, predictions: Sequence[TagsPrediction]) -> dict[str, float]:
        """Return scores of entities where the tags mark such, else accuracy and macro_f1."""
        from lora_cli.metrics.tags import entity_metrics, word_metrics

        predicted, actual = self._tags(predictions)
        if self._has_entities:
            return entity_metrics(predicted, actual)
        return word_metrics(predicted, actual, self._names)

    def report(self, predictions: Sequence[TagsPrediction]) -> dict[str, Any]:
        """Return types of entities, or tags, with their scores and the averages of these."""
        from lora_cli.metrics.tags import entity_report, word_report

        predicted, actual = self._tags(predictions)
        if self._has_entities:
            return entity_report(predicted, actual)
        return word_report(predicted, actual, self._names)

    def to_json(self, prediction: TagsPrediction) -> dict[str, Any]:
        """Return id, text, tags and the spans that they mark, and the true tags if known.

        A span has start, end (both in characters of the text, the end not included), label and
        text. Where tags mark no entities every word is a span.
        """
        from lora_cli.metrics.tags import OUTSIDE, find_entities

        tags = self._shown(prediction.tags)
        entities = (
            find_entities(tags)
            if self._has_entities
            else [(tag, n, n + 1) for n, tag in enumerate(tags) if tag is not None]
        )
        spans = []
        for label, first, end in entities:
            place = prediction.spans[first][0], prediction.spans[end - 1][1]
            text = prediction.text[slice(*place)]
            spans.append({"start": place[0], "end": place[1], "label": label, "text": text})
        line: dict[str, Any] = {
            "id": prediction.id,
            "text": prediction.text,
            "tags": [tag or OUTSIDE for tag in tags] if self._has_entities else tags,
            "spans": spans,
        }
        if prediction.reference is not None:
            line["reference"] = self._shown(prediction.reference)
        return line

    def _shown(self, tags: Sequence[int | None]) -> list[str | None]:
        return [None if tag is None else self._names[tag] for tag in tags]

    def _tags(self, predictions: Sequence[TagsPrediction]) -> tuple[Any, Any]:
        """Return predicted and true tags of the rows whose tags are known, by name."""
        from lora_cli.metrics.tags import OUTSIDE

        missing = OUTSIDE if self._has_entities else None
        known = [(p.tags, p.reference) for p in predictions if p.reference is not None]
        return (
            [[tag or missing for tag in self._shown(tags)] for tags, _ in known],
            [self._shown(reference) for _, reference in known],
        )


class TokenClassification(LabelFamily):
    """The family's row in the table."""

    auto_class = "AutoModelForTokenClassification"
    task_type: str | None = "TOKEN_CLS"
    inputs = (Role("tokens", ("tokens", "words"), made_up=made_up.tokens),)
    targets = (
        Role(
            "tags",
            ("tags", "ner_tags", "labels", "pos_tags", "chunk_tags", "upos"),
            made_up=made_up.tags,
        ),
    )
    layouts = WORD_LAYOUTS

    def check_rows(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse rows without words, and rows that have not one tag for each word."""
        words, tags = columns["tokens"], columns["tags"]
        if words is None:
            return check_texts(rows, columns["text"] or "")
        problems = check_words(rows, words)
        return problems if tags is None else problems + check_tags(rows, words, tags)

    def learn(
        self,
        config: TokenClassificationConfig,
        train: Sequence[Row],
        loaded: Loaded,
        columns: Columns,
    ) -> dict[str, Any]:
        """Return what `LabelFamily` does, and ``entities``, whether the tags mark such.

        Raises:
            UserError: If the metric is one of entities and the tags mark none.
        """
        from lora_cli.metrics.tags import has_entities

        state = super().learn(config, train, loaded, columns)
        state["entities"] = has_entities(state["labels"])
        if not state["entities"] and config.metric == "f1":
            raise UserError(_no_entities(state["labels"]))
        return state

    def labels_of(self, value: Any) -> tuple[str, ...]:
        """Return the tags of the words."""
        return tags_of(value) or ()

    def describe(self, state: Mapping[str, Any]) -> str:
        """Return the number of tags."""
        kind = "tags that mark entities" if state["entities"] else "tags, one for each word"
        return f"{len(state['labels'])} {kind}"

    def bind_columns(
        self, columns: Sequence[str], state: Mapping[str, Any], *, where: str
    ) -> Mapping[str, Any]:
        """Find the words among the columns of rows to predict, or else a text to split."""
        trained = state["columns"]["tokens"]
        texts = [name for name in TEXT_COLUMNS if name in columns]
        if trained not in columns and texts:
            return {**state, "columns": {"tokens": None, "tags": None, "text": texts[0]}}
        return super().bind_columns(columns, state, where=where)

    def check_row(self, row: Row, state: Mapping[str, Any]) -> None:
        """Refuse a row without words or text."""
        raise_if(self.check_rows((row,), {**state["columns"], "tags": None}))

    def build(
        self, config: TokenClassificationConfig, state: Mapping[str, Any], processor: Any
    ) -> TokenClassificationTask:
        """Bind the family; `processor` is a tokenizer that tells which word a token is of."""
        return TokenClassificationTask(config, state, processor)


def _needs_space(tokenizer: Any) -> bool:
    """Whether a word of a list is read as in a text only if the space before it comes with it.

    So it is with tokenizers that work on bytes, which take it for the rest of a word otherwise.

    Raises:
        UserError: If the tokenizer cannot tell which word a token is of.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            Problem(
                id="task.slow-tokenizer",
                message="The tokenizer must tell which word each token is of, but "
                f"{type(tokenizer).__name__} does not.",
                fix="use a model that has a tokenizer.json",
            )
        )
    wanted, plain, spaced = (
        tokenizer(words, is_split_into_words=isinstance(words, list))["input_ids"]
        for words in ("a b", ["a", "b"], ["a", " b"])
    )
    return bool(plain != wanted and spaced == wanted)


def _no_entities(names: Sequence[str]) -> Problem:
    return Problem(
        id="task.no-entities",
        message="`task.metric` must suit the tags, but f1 is of entities (B-PER, I-PER, O), and "
        f"these mark none: {', '.join(names[:10])}.",
        key="task.metric",
        allowed="accuracy, macro_f1",
        fix="task.metric=accuracy",
    )
