"""The settings of task families that generate text; `lora_cli.config.tasks` says the rest."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lora_cli.config.generation import GenerationConfig
from lora_cli.config.tasks import DataConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatConfig:
    """What an assistant answers: instructions, and conversations of several turns."""

    family: Literal["chat"] = "chat"
    """Task family: decides head, loss, metrics and columns."""

    data: DataConfig = field(default_factory=DataConfig)

    max_length: int = field(default=1024, metadata={"min": 16})
    """Tokens of a conversation at most, those of the template included."""

    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What to do with longer conversations: keep their first tokens, leave them out, or refuse."""

    chat_template: str | None = field(default=None, metadata={"path": True, "text": True})
    """chatml, alpaca, or a file with a template in Jinja; null takes the template of the model."""

    system_prompt: str | None = field(default=None, metadata={"text": True})
    """System prompt of conversations that have none; null leaves it to the template."""

    packing: bool = False
    """Train on several conversations in one row of max_length tokens; none sees another."""

    generate_in_eval: bool = False
    """Whether evaluations answer the last question too, for exact_match, bleu, chrf and rougeL."""

    generation: GenerationConfig = field(default_factory=GenerationConfig)

    metric: Literal["perplexity", "token_accuracy", "exact_match", "bleu", "chrf", "rougeL"] = (
        "perplexity"
    )
    """Metric that selects the best checkpoint; the last four need generate_in_eval=true."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageChatConfig:
    """What an assistant answers that is shown images: instructions, questions, conversations."""

    family: Literal["image_chat"] = "image_chat"
    """Task family: decides head, loss, metrics and columns."""

    data: DataConfig = field(default_factory=DataConfig)

    max_length: int = field(default=2048, metadata={"min": 16})
    """Tokens of a conversation at most, with all that stand for its images; none is cut."""

    overlong: Literal["drop", "error"] = "drop"
    """What to do with longer conversations: leave them out, or refuse."""

    max_pixels: int | None = field(default=None, metadata={"min": 1})
    """Images with more pixels are made smaller first, in their shape; null leaves them."""

    chat_template: str | None = field(default=None, metadata={"path": True, "text": True})
    """A file with a template in Jinja that shows images; null takes the template of the model."""

    system_prompt: str | None = field(default=None, metadata={"text": True})
    """System prompt of conversations that have none; null leaves it to the template."""

    generate_in_eval: bool = False
    """Whether evaluations answer the last question too, for exact_match, bleu, chrf and rougeL."""

    generation: GenerationConfig = field(default_factory=GenerationConfig)

    metric: Literal["perplexity", "token_accuracy", "exact_match", "bleu", "chrf", "rougeL"] = (
        "perplexity"
    )
    """Metric that selects the best checkpoint; the last four need generate_in_eval=true."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalLanguageModelingConfig:
    """The next token of plain text: a decoder learns the language of a domain."""

    family: Literal["causal_language_modeling"] = "causal_language_modeling"
    """Task family: decides head, loss, metrics and columns."""

    data: DataConfig = field(default_factory=DataConfig)

    max_length: int = field(default=512, metadata={"min": 16})
    """Tokens of a window; a longer text becomes several, so that nothing of it is cut."""

    end_of_text: bool = True
    """Whether each text ends with the end token of the tokenizer, which is learned as well."""

    packing: bool = True
    """Train on several texts in one row of max_length tokens; none sees another."""

    generation: GenerationConfig = field(default_factory=GenerationConfig)

    metric: Literal["perplexity", "token_accuracy"] = "perplexity"
    """Metric that selects the best checkpoint; both are reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seq2SeqConfig:
    """A text for another: translation, summaries, texts about data, by an encoder and a decoder."""

    family: Literal["seq2seq"] = "seq2seq"
    """Task family: decides head, loss, metrics and columns."""

    data: DataConfig = field(default_factory=DataConfig)

    max_length: int = field(default=128, metadata={"min": 4})
    """Tokens to keep of each source; longer ones are cut, and the number cut is reported."""

    max_target_length: int = field(default=128, metadata={"min": 4})
    """Tokens to keep of each target that is learned; longer ones are cut, and counted as well."""

    prefix: str = field(default="", metadata={"text": True})
    """Text before each source, such as "summarize: " for T5 or ">>fra<< " for some of Marian."""

    source_language: str | None = field(default=None, metadata={"text": True})
    """Code of the source's language as the tokenizer of mBART, M2M100 or NLLB has it: en_XX."""

    target_language: str | None = field(default=None, metadata={"text": True})
    """Code of the target's language as the tokenizer of mBART, M2M100 or NLLB has it: de_DE."""

    generate_in_eval: bool = True
    """Whether evaluations write texts as well, for bleu, chrf, ROUGE and exact_match."""

    bleu_tokenizer: Literal["auto", "13a", "intl", "zh", "char", "none"] = "auto"
    """What BLEU takes for a word, as sacreBLEU names it; auto goes by the script of the targets."""

    generation: GenerationConfig = field(default_factory=GenerationConfig)

    metric: Literal["loss", "chrf", "bleu", "rougeL", "exact_match"] = "chrf"
    """Metric that selects the best checkpoint; all but loss need generate_in_eval=true."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerSettings:
    """What both families that choose among answers are told."""

    data: DataConfig = field(default_factory=DataConfig)

    max_length: int = field(default=256, metadata={"min": 16})
    """Tokens of prompt and answer at most; the beginning of longer prompts is cut, and counted."""

    prompt: str = field(default="{text}\nAnswer:", metadata={"text": True})
    """What is before an answer: {text}, {text_pair} and {NAME} of any column are filled in."""

    answers: Mapping[str, str] = field(default_factory=dict)
    """Text of the answer for each label, as {"0": "no", "1": "yes"}; empty takes the labels."""

    normalize: Literal["none", "tokens", "characters"] = "tokens"
    """What log-probabilities of answers are divided by before the largest is taken."""

    metric: Literal["accuracy", "macro_f1", "matthews_correlation"] = "accuracy"
    """Metric that selects the best checkpoint; all of them are reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerChoiceConfig(AnswerSettings):
    """One label for each row, by which of some answers a decoder finds most likely."""

    family: Literal["answer_choice"] = "answer_choice"
    """Task family: decides head, loss, metrics and columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerChoiceSeq2SeqConfig(AnswerSettings):
    """One label for each row, by which of some answers an encoder-decoder finds most likely."""

    family: Literal["answer_choice_seq2seq"] = "answer_choice_seq2seq"
    """Task family: decides head, loss, metrics and columns."""
