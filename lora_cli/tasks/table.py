"""The task families by name; a new family adds one row here and one file beside."""

from lora_cli.tasks.contract import Family
from lora_cli.tasks.text_classification import TextClassification

FAMILIES: dict[str, Family] = {"text_classification": TextClassification()}
