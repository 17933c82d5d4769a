"""The task families by name; a new family adds one row here and one file beside."""

from lora_cli.tasks.answer_choice import AnswerChoice
from lora_cli.tasks.answer_choice_seq2seq import AnswerChoiceSeq2Seq
from lora_cli.tasks.audio_classification import AudioClassification
from lora_cli.tasks.causal_language_modeling import CausalLanguageModeling
from lora_cli.tasks.chat import Chat
from lora_cli.tasks.contract import Family
from lora_cli.tasks.image_chat import ImageChat
from lora_cli.tasks.image_classification import ImageClassification, ImageMultiLabel
from lora_cli.tasks.image_text_contrastive import ImageTextContrastive
from lora_cli.tasks.masked_language_modeling import MaskedLanguageModeling
from lora_cli.tasks.multi_label import MultiLabelClassification
from lora_cli.tasks.multiple_choice import MultipleChoice
from lora_cli.tasks.object_detection import ObjectDetection
from lora_cli.tasks.question_answering import QuestionAnswering
from lora_cli.tasks.ranking import Ranking
from lora_cli.tasks.semantic_segmentation import SemanticSegmentation
from lora_cli.tasks.seq2seq import Seq2Seq
from lora_cli.tasks.speech_recognition_ctc import SpeechRecognitionCTC
from lora_cli.tasks.speech_recognition_seq2seq import SpeechRecognitionSeq2Seq
from lora_cli.tasks.text_classification import TextClassification
from lora_cli.tasks.text_regression import TextRegression
from lora_cli.tasks.token_classification import TokenClassification

FAMILIES: dict[str, Family] = {
    "text_classification": TextClassification(),
    "multi_label_classification": MultiLabelClassification(),
    "text_regression": TextRegression(),
    "token_classification": TokenClassification(),
    "multiple_choice": MultipleChoice(),
    "question_answering": QuestionAnswering(),
    "ranking": Ranking(),
    "masked_language_modeling": MaskedLanguageModeling(),
    "causal_language_modeling": CausalLanguageModeling(),
    "chat": Chat(),
    "seq2seq": Seq2Seq(),
    "answer_choice": AnswerChoice(),
    "answer_choice_seq2seq": AnswerChoiceSeq2Seq(),
    "image_classification": ImageClassification(),
    "image_multi_label": ImageMultiLabel(),
    "audio_classification": AudioClassification(),
    "speech_recognition_ctc": SpeechRecognitionCTC(),
    "image_text_contrastive": ImageTextContrastive(),
    "speech_recognition_seq2seq": SpeechRecognitionSeq2Seq(),
    "semantic_segmentation": SemanticSegmentation(),
    "object_detection": ObjectDetection(),
    "image_chat": ImageChat(),
}
