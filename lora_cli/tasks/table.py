"""The task families by name; a new family adds one row here and one file beside."""

from lora_cli.tasks.contract import Family
from lora_cli.tasks.multi_label import MultiLabelClassification
from lora_cli.tasks.text_classification import TextClassification
from lora_cli.tasks.text_regression import TextRegression
from lora_cli.tasks.token_classification import TokenClassification

FAMILIES: dict[str, Family] = {
    "text_classification": TextClassification(),
    "multi_label_classification": MultiLabelClassification(),
    "text_regression": TextRegression(),
    "token_classification": TokenClassification(),
}
