"""The task section: where the rows are, and the settings of each task family that understands.

`metadata` of a field is that of `lora_cli.config.sections`. A new family adds a dataclass here, or
in `lora_cli.config.language` if it generates, `lora_cli.config.media` if it reads images or
`lora_cli.config.audio` if it reads sounds, the columns that it reads to `DataConfig`, and its row
in `lora_cli.config.task_families`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from lora_cli.config.sections import path_field, text_field

_CLASSES = ("text_classification", "multi_label_classification")
_IMAGES = ("image_classification", "image_multi_label")
_MASKS = ("semantic_segmentation",)
_BOXES = ("object_detection",)
_SOUNDS = ("audio_classification",)
_CAPTIONED = ("image_text_contrastive",)
_SPEECH = ("speech_recognition_ctc", "speech_recognition_seq2seq")
_SEVERAL = ("multi_label_classification", "image_multi_label")
_TEXTS = (*_CLASSES, "text_regression")
_TOKENS = ("token_classification",)
_CHOICES = ("multiple_choice",)
_ANSWERS = ("question_answering",)
_RANKING = ("ranking",)
_MASKED = ("masked_language_modeling",)
_CAUSAL = ("causal_language_modeling",)
_CHAT = ("chat",)
_IMAGE_CHAT = ("image_chat",)
_PAIRS = ("seq2seq",)
_CHOSEN = ("answer_choice", "answer_choice_seq2seq")
_NAMED = (*_CLASSES, *_IMAGES, *_MASKS, *_BOXES, *_SOUNDS, *_TOKENS, *_CHOSEN)


def _column(*families: str) -> Any:
    """The name of a column that some families read, and others refuse."""
    return field(default=None, metadata={"text": True, "only": {"task.family": families}})


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the rows are and what their columns are called."""

    path: str | None = path_field()
    """Hub data set, file (jsonl json csv tsv parquet conll), or folder of train/... files."""

    name: str | None = text_field()
    """Configuration of a hub data set, such as sst2 of nyu-mll/glue."""

    revision: str | None = text_field()
    """Branch, tag or commit of a hub data set."""

    text_column: str | None = _column(*_TEXTS, *_MASKED, *_CAUSAL, *_CHOSEN, *_SPEECH)
    """Column with the text; null takes the first that exists of text, sentence, content, ..."""

    text_pair_column: str | None = _column(*_TEXTS, *_CHOSEN)
    """Column with a second text; null means single texts."""

    image_column: str | None = _column(*_IMAGES, *_CAPTIONED, *_MASKS, *_BOXES, *_IMAGE_CHAT)
    """Column with the path or the bytes of an image, or a list of such; null: image, img, ..."""

    mask_column: str | None = _column(*_MASKS)
    """Column with the path or the bytes of a mask; null takes the first of mask, annotation, ..."""

    objects_column: str | None = _column(*_BOXES)
    """Column with boxes and categories; null takes the first of objects, annotations, boxes."""

    audio_column: str | None = _column(*_SOUNDS, *_SPEECH)
    """Column with the path or the bytes of a sound; null takes the first of audio, sound, ..."""

    caption_column: str | None = _column(*_CAPTIONED)
    """Column with what an image shows, a text or a list of texts; null takes caption, text, ..."""

    label_column: str | None = _column(
        *_TEXTS, *_IMAGES, *_SOUNDS, *_RANKING, *_CHOSEN, *_CAPTIONED
    )
    """Column with the label, labels or number; null takes the first of label, labels, class, ..."""

    label_columns: tuple[str, ...] | None = field(
        default=None,
        metadata={"text": True, "only": {"task.family": _SEVERAL}},
    )
    """Columns that are labels, 1 or 0 in each row, in place of one that lists the labels."""

    tokens_column: str | None = _column(*_TOKENS)
    """Column with the list of words; null takes the first that exists of tokens, words."""

    tags_column: str | None = _column(*_TOKENS)
    """Column with a tag a word; null takes tags, ner_tags, labels, ... (conll: 2, 3, ..., tags)."""

    context_column: str | None = _column(*_CHOICES, *_ANSWERS)
    """Column with the text that a question is about; null takes context, article, sent1, ..."""

    question_column: str | None = _column(*_CHOICES, *_ANSWERS)
    """Column with the question, or the start of all choices; null takes question, sent2, ..."""

    choices_column: str | None = _column(*_CHOICES)
    """Column with the list of choices; null takes the first of choices, options, endings, ..."""

    choice_columns: tuple[str, ...] | None = field(
        default=None, metadata={"text": True, "only": {"task.family": _CHOICES}}
    )
    """Columns with one choice each, in order; null takes ending0, ending1, ... where they are."""

    answer_column: str | None = _column(*_CHOICES)
    """Column with the right choice; null takes the first of answer, label, answerKey, ..."""

    answers_column: str | None = _column(*_ANSWERS)
    """Column with text and place of the answers, or one text; null takes answers, answer, ..."""

    answer_start_column: str | None = _column(*_ANSWERS)
    """Column with the place of answers that are one text, in characters of the context from 0."""

    user_column: str | None = _column(*_RANKING)
    """Column with the user; null takes user, user_id, ... With lists of candidates not needed."""

    history_column: str | None = _column(*_RANKING)
    """Column with what the user liked before, oldest first: a text or a list of texts."""

    candidate_column: str | None = _column(*_RANKING)
    """Column with what to rank: a text, or a list of texts with a list of labels."""

    time_column: str | None = _column(*_RANKING)
    """Column by which the latest rows of each user are cut from train; null cuts whole users."""

    messages_column: str | None = _column(*_CHAT, *_IMAGE_CHAT)
    """Column with messages, as of OpenAI or ShareGPT; null takes messages, conversations, ..."""

    prompt_column: str | None = _column(*_CHAT, *_IMAGE_CHAT)
    """Column with what the user says, where there are no messages; null takes prompt, ..."""

    input_column: str | None = _column(*_CHAT, *_IMAGE_CHAT)
    """Column with a text that goes below the prompt, as in Alpaca; null takes input where it is."""

    completion_column: str | None = _column(*_CHAT, *_IMAGE_CHAT)
    """Column with the answer to the prompt; null takes completion, output, response, answer, ..."""

    system_column: str | None = _column(*_CHAT, *_IMAGE_CHAT)
    """Column with the system prompt; null takes system or system_prompt where there is one."""

    documents_column: str | None = _column(*_CHAT)
    """Column with passages that were retrieved for the last question; null takes documents, ..."""

    source_column: str | None = _column(*_PAIRS)
    """Column with the text to start from, as translation.en; null takes source, article, ..."""

    target_column: str | None = _column(*_PAIRS)
    """Column with the text wanted, or several, the first of which is learned; null: target, ..."""

    label_names: tuple[str, ...] | None = field(
        default=None, metadata={"only": {"task.family": _NAMED}}
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
class TaskSection:
    """What the settings of every family have."""

    family: str = ""
    """Task family: decides head, loss, metrics and columns."""

    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class _FamilyConfig(TaskSection):
    max_length: int = field(default=128, metadata={"min": 4})
    """Tokens to keep of each row; longer rows are cut, and the number cut is reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextClassificationConfig(_FamilyConfig):
    """One label for each text, or for each pair of texts."""

    family: Literal["text_classification"] = "text_classification"

    class_weights: Literal["none", "balanced"] = "none"
    """balanced weighs each label in the loss by N / (C n), for C labels with n of N rows each."""

    metric: Literal["accuracy", "macro_f1", "matthews_correlation"] = "accuracy"
    """Metric that selects the best checkpoint; all of them are reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiLabelClassificationConfig(_FamilyConfig):
    """Any number of labels for each text, or for each pair of texts."""

    family: Literal["multi_label_classification"] = "multi_label_classification"

    threshold: float = field(default=0.5, metadata={"above": 0, "below": 1})
    """A label is given where its probability is at least this."""

    class_weights: Literal["none", "balanced"] = "none"
    """balanced weighs rows that have a label by (N - n) / n, where n of N rows have it."""

    metric: Literal["micro_f1", "macro_f1", "exact_match"] = "micro_f1"
    """Metric that selects the best checkpoint; all of them are reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRegressionConfig(_FamilyConfig):
    """A number for each text, or for each pair of texts."""

    family: Literal["text_regression"] = "text_regression"

    metric: Literal["pearson", "spearman", "mse"] = "pearson"
    """Metric that selects the best checkpoint; all of them are reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenClassificationConfig(_FamilyConfig):
    """A tag for each word of a text: entities, parts of speech, chunks."""

    family: Literal["token_classification"] = "token_classification"

    max_length: int = field(default=128, metadata={"min": 4})
    """Tokens to keep of each row; words beyond are not learned, and count as tagged O."""

    metric: Literal["f1", "macro_f1", "accuracy"] = "f1"
    """Metric that selects the best checkpoint: f1 of entities, its mean over types, or of words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MultipleChoiceConfig(_FamilyConfig):
    """Which of some choices is the right one, given a text, a question or both."""

    family: Literal["multiple_choice"] = "multiple_choice"

    max_length: int = field(default=128, metadata={"min": 4})
    """Tokens to keep of text, question and one choice; what is cut is the text, never a choice."""

    answers: Literal["auto", "index", "number", "letter", "text", "key"] = "auto"
    """index from 0, number from 1, letter A, B, ..., text or key of the choice; auto: what fits."""

    metric: Literal["accuracy"] = "accuracy"
    """Metric that selects the best checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankingConfig(_FamilyConfig):
    """Which candidates come first for a user, given what the user liked before."""

    family: Literal["ranking"] = "ranking"

    max_length: int = field(default=128, metadata={"min": 4})
    """Tokens to keep of history and one candidate; the oldest history is cut, no candidate."""

    k: int = field(default=10, metadata={"min": 1})
    """Places that ndcg and hit_rate look at."""

    users_without_clicks: Literal["refuse", "skip"] = "refuse"
    """What to do with users of an evaluation split who have no row with label 1."""

    metric: Literal["auc", "ndcg", "hit_rate", "mrr", "auc_all"] = "auc"
    """Metric that selects the best checkpoint: a mean over users, or auc_all over all rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionAnsweringConfig(_FamilyConfig):
    """The part of a context that answers a question, or none."""

    family: Literal["question_answering"] = "question_answering"

    max_length: int = field(default=384, metadata={"min": 16})
    """Tokens of a window: the question, half of them at most, and what fits of the context."""

    stride: int | None = field(default=None, metadata={"min": 0})
    """Tokens that a window of a long context shares with the next; null: a third of max_length."""

    max_answer_length: int = field(default=30, metadata={"min": 1})
    """Tokens that a predicted answer has at most."""

    n_best: int = field(default=5, metadata={"min": 1, "max": 100})
    """Answers that predict writes for each question, best first."""

    no_answer_threshold: float | None = None
    """No answer where no_answer_score is above this; null: 0 if train has such rows, else never."""

    answer_unit: Literal["words", "characters"] = "words"
    """What F1 counts: words as SQuAD does, or runs of characters as CMRC 2018 does for Chinese."""

    metric: Literal["f1", "exact_match"] = "f1"
    """Metric that selects the best checkpoint; both are reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedLanguageModelingConfig(_FamilyConfig):
    """The words that were masked in plain text: an encoder learns the language of a domain."""

    family: Literal["masked_language_modeling"] = "masked_language_modeling"

    max_length: int = field(default=128, metadata={"min": 16})
    """Tokens of a window; a longer text becomes several, so that nothing of it is cut."""

    mask_probability: float = field(default=0.15, metadata={"above": 0, "below": 1})
    """Share of the words of a text that is masked."""

    whole_words: bool = True
    """Whether all tokens of a word are masked together; false masks single tokens."""

    metric: Literal["perplexity", "accuracy"] = "perplexity"
    """Metric that selects the best checkpoint, over the masked tokens; both are reported."""
