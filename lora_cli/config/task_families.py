"""The table of task families: the settings of each by its name. A new family adds two rows."""

from lora_cli.config.audio import (
    AudioClassificationConfig,
    SpeechRecognitionCTCConfig,
    SpeechRecognitionSeq2SeqConfig,
)
from lora_cli.config.language import (
    AnswerChoiceConfig,
    AnswerChoiceSeq2SeqConfig,
    CausalLanguageModelingConfig,
    ChatConfig,
    ImageChatConfig,
    Seq2SeqConfig,
)
from lora_cli.config.media import (
    ImageClassificationConfig,
    ImageMultiLabelConfig,
    ImageTextContrastiveConfig,
    ObjectDetectionConfig,
    SemanticSegmentationConfig,
)
from lora_cli.config.tasks import (
    MaskedLanguageModelingConfig,
    MultiLabelClassificationConfig,
    MultipleChoiceConfig,
    QuestionAnsweringConfig,
    RankingConfig,
    TextClassificationConfig,
    TextRegressionConfig,
    TokenClassificationConfig,
)

TaskConfig = (
    TextClassificationConfig
    | MultiLabelClassificationConfig
    | TextRegressionConfig
    | TokenClassificationConfig
    | MultipleChoiceConfig
    | QuestionAnsweringConfig
    | RankingConfig
    | MaskedLanguageModelingConfig
    | CausalLanguageModelingConfig
    | ChatConfig
    | Seq2SeqConfig
    | AnswerChoiceConfig
    | AnswerChoiceSeq2SeqConfig
    | ImageClassificationConfig
    | ImageMultiLabelConfig
    | AudioClassificationConfig
    | SpeechRecognitionCTCConfig
    | ImageTextContrastiveConfig
    | SpeechRecognitionSeq2SeqConfig
    | SemanticSegmentationConfig
    | ObjectDetectionConfig
    | ImageChatConfig
)

TASKS: dict[str, type[TaskConfig]] = {
    "text_classification": TextClassificationConfig,
    "multi_label_classification": MultiLabelClassificationConfig,
    "text_regression": TextRegressionConfig,
    "token_classification": TokenClassificationConfig,
    "multiple_choice": MultipleChoiceConfig,
    "question_answering": QuestionAnsweringConfig,
    "ranking": RankingConfig,
    "masked_language_modeling": MaskedLanguageModelingConfig,
    "causal_language_modeling": CausalLanguageModelingConfig,
    "chat": ChatConfig,
    "seq2seq": Seq2SeqConfig,
    "answer_choice": AnswerChoiceConfig,
    "answer_choice_seq2seq": AnswerChoiceSeq2SeqConfig,
    "image_classification": ImageClassificationConfig,
    "image_multi_label": ImageMultiLabelConfig,
    "audio_classification": AudioClassificationConfig,
    "speech_recognition_ctc": SpeechRecognitionCTCConfig,
    "image_text_contrastive": ImageTextContrastiveConfig,
    "speech_recognition_seq2seq": SpeechRecognitionSeq2SeqConfig,
    "semantic_segmentation": SemanticSegmentationConfig,
    "object_detection": ObjectDetectionConfig,
    "image_chat": ImageChatConfig,
}
"""Settings of each family, by its name."""

COMPARING = ("image_text_contrastive",)
"""Families whose loss compares the rows of a micro-batch with each other."""
