"""The task section: where the rows are, and the settings of each task family.

`metadata` of a field is that of `lora_cli.config.sections`. A new family adds a dataclass here, the
columns that it reads to `DataConfig`, and its row in TASKS.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from lora_cli.config.sections import path_field, text_field

_CLASSES = ("text_classification", "multi_label_classification")
_TEXTS = (*_CLASSES, "text_regression")
_TOKENS = ("token_classification",)


def _column(*families: str) -> Any:
    """The name of a column that some families read, and others refuse."""
    return field(default=None, metadata={"text": True, "only": {"task.family": families}})


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the rows are and what their columns are called."""

    path: str | None = path_field()
    """Hub data set, file (jsonl json csv tsv parquet), or folder of train/validation/test files."""

    name: str | None = text_field()
    """Configuration of a hub data set, such as sst2 of nyu-mll/glue."""

    revision: str | None = text_field()
    """Branch, tag or commit of a hub data set."""

    text_column: str | None = _column(*_TEXTS)
    """Column with the text; null takes the first that exists of text, sentence, content, ..."""

    text_pair_column: str | None = _column(*_TEXTS)
    """Column with a second text; null means single texts."""

    label_column: str | None = _column(*_TEXTS)
    """Column with the label, labels or number; null takes the first of label, labels, class, ..."""

    tokens_column: str | None = _column(*_TOKENS)
    """Column with the list of words; null takes the first that exists of tokens, words."""

    tags_column: str | None = _column(*_TOKENS)
    """Column with one tag a word; null takes the first of tags, ner_tags, labels, pos_tags, ..."""

    label_names: tuple[str, ...] | None = field(
        default=None, metadata={"only": {"task.family": (*_CLASSES, *_TOKENS)}}
    )
    """Label or tag names in order; null sorts those found in train. Names integers 0, 1, ..."""

    train_split: str = field(default="train", metadata={"text": True})
    """Split to train on."""

    validation_split: str | float | None = None
    """Split name, or a fraction to cut from train; null looks for one, else cuts 0.1."""

    test_split: str | float | None = None
    """Split name, a fraction to cut from train, or "none"; null looks for one."""

    max_train_rows: int | None = field(default=None, metadata={"min": 1})
    """Train on at most this many rows, drawn at random by the seed."""

    max_eval_rows: int | None = field(default=None, metadata={"min": 1})
    """Validate and test on at most this many rows each, drawn at random by the seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextClassificationConfig:
    """One label for each text, or for each pair of texts."""

    family: Literal["text_classification"] = "text_classification"
    """Task family: decides head, loss, metrics and columns."""

    data: DataConfig = field(default_factory=DataConfig)

    max_length: int = field(default=128, metadata={"min": 4})
    """Tokens to keep of each row; longer rows are cut, and the number cut is reported."""

    class_weights: Literal["none", "balanced"] = "none"
    """balanced weighs each label in the loss by N / (C n), for C labels with n of N rows each."""

    metric: Literal["accuracy", "macro_f1", "matthews_correlation"] = "accuracy"
    """Metric that selects the best checkpoint; all of them are reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiLabelClassificationConfig:
    """Any number of labels for each text, or for each pair of texts."""

    family: Literal["multi_label_classification"] = "multi_label_classification"
    """Task family: decides head, loss, metrics and columns."""

    data: DataConfig = field(default_factory=DataConfig)

    max_length: int = field(default=128, metadata={"min": 4})
    """Tokens to keep of each row; longer rows are cut, and the number cut is reported."""

    threshold: float = field(default=0.5, metadata={"above": 0, "below": 1})
    """A label is given where its probability is at least this."""

    class_weights: Literal["none", "balanced"] = "none"
    """balanced weighs rows that have a label by (N - n) / n, where n of N rows have it."""

    metric: Literal["micro_f1", "macro_f1", "exact_match"] = "micro_f1"
    """Metric that selects the best checkpoint; all of them are reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRegressionConfig:
    """A number for each text, or for each pair of texts."""

    family: Literal["text_regression"] = "text_regression"
    """Task family: decides head, loss, metrics and columns."""

    data: DataConfig = field(default_factory=DataConfig)

    max_length: int = field(default=128, metadata={"min": 4})
    """Tokens to keep of each row; longer rows are cut, and the number cut is reported."""

    metric: Literal["pearson", "spearman", "mse"] = "pearson"
    """Metric that selects the best checkpoint; all of them are reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenClassificationConfig:
    """A tag for each word of a text: entities, parts of speech, chunks."""

    family: Literal["token_classification"] = "token_classification"
    """Task family: decides head, loss, metrics and columns."""

    data: DataConfig = field(default_factory=DataConfig)

    max_length: int = field(default=128, metadata={"min": 4})
    """Tokens to keep of each row; words beyond are not learned, and count as tagged O."""

    metric: Literal["f1", "macro_f1", "accuracy"] = "f1"
    """Metric that selects the best checkpoint: f1 of entities, its mean over types, or of words."""


TaskConfig = (
    TextClassificationConfig
    | MultiLabelClassificationConfig
    | TextRegressionConfig
    | TokenClassificationConfig
)

TASKS: dict[str, type[TaskConfig]] = {
    "text_classification": TextClassificationConfig,
    "multi_label_classification": MultiLabelClassificationConfig,
    "text_regression": TextRegressionConfig,
    "token_classification": TokenClassificationConfig,
}
"""Settings of each family, by its name."""
