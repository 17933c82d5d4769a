"""The configuration of each subcommand, put together from the sections."""

from dataclasses import dataclass, field
from typing import Literal

from lora_cli.config.optim import (
    AdafactorConfig,
    AdamWConfig,
    ConstantConfig,
    CosineConfig,
    LinearConfig,
    OptimizerConfig,
    PolynomialConfig,
    SchedulerConfig,
    SgdConfig,
)
from lora_cli.config.sections import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    TextClassificationConfig,
    TrainerConfig,
    path_field,
    text_field,
)

TaskConfig = TextClassificationConfig

# Sections that hold one of several dataclasses: the key that tells which, and its table.
# A task family, optimizer or schedule is added here and in the module that runs it.
VARIANTS: dict[str, tuple[str, dict[str, type]]] = {
    "task": ("family", {"text_classification": TextClassificationConfig}),
    "optimizer": ("name", {"adamw": AdamWConfig, "sgd": SgdConfig, "adafactor": AdafactorConfig}),
    "scheduler": (
        "name",
        {
            "linear": LinearConfig,
            "cosine": CosineConfig,
            "constant": ConstantConfig,
            "polynomial": PolynomialConfig,
        },
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Train an adapter."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TextClassificationConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)
    scheduler: SchedulerConfig = field(default_factory=LinearConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    seed: int = field(default=42, metadata={"min": 0, "max": 2**32 - 1})
    """Decides the start of head and adapter, the order of rows, dropout and cut splits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskDataConfig:
    """Rows to use instead of those that the adapter was trained and evaluated on."""

    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Evaluate base model, adapter and merged model side by side."""

    from_: str | None = path_field()
    """Run or adapter directory."""

    base: str | None = path_field()
    """Where the base model is now, if it has moved; its sha256 must be the recorded one."""

    merged: str | None = path_field()
    """Merged model directory to evaluate from disk; null merges in memory."""

    exported: str | None = path_field()
    """ONNX file to evaluate as well."""

    split: str | None = text_field()
    """Split to evaluate; null takes test where there is one, else validation."""

    output: str | None = path_field()
    """File for the predictions; null writes into predictions/ of the run directory."""

    batch_size: int = field(default=64, metadata={"min": 1})
    """Rows in memory at once."""

    task: TaskDataConfig = field(default_factory=TaskDataConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig:
    """Predict labels for new rows."""

    from_: str | None = path_field()
    """Run or adapter directory."""

    base: str | None = path_field()
    """Where the base model is now, if it has moved; its sha256 must be the recorded one."""

    input_: str = field(default="-", metadata={"path": True, "text": True})
    """File with the rows (jsonl, csv, tsv, or txt with one text a line); - reads from stdin."""

    text: str | None = text_field()
    """One text to predict, instead of input."""

    output: str = field(default="-", metadata={"path": True, "text": True})
    """File for the predictions, one JSON object a line; - writes to stdout."""

    format_: Literal["auto", "jsonl", "csv", "tsv", "txt"] = "auto"
    """Layout of the input; auto goes by the file name, and takes jsonl for stdin."""

    batch_size: int = field(default=64, metadata={"min": 1})
    """Rows in memory at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig:
    """Add the adapter into the base weights and write an ordinary Hugging Face model."""

    from_: str | None = path_field()
    """Run or adapter directory."""

    base: str | None = path_field()
    """Where the base model is now, if it has moved; its sha256 must be the recorded one."""

    output: str | None = path_field()
    """Folder for the merged model; null writes merged/ in the run directory."""

    check_rows: int = field(default=64, metadata={"min": 0})
    """Real rows on which merged and adapter outputs are compared; 0 skips the comparison."""

    task: TaskDataConfig = field(default_factory=TaskDataConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Write the adapter or the merged model in a format that other programs read."""

    from_: str | None = path_field()
    """Run or adapter directory."""

    base: str | None = path_field()
    """Where the base model is now, if it has moved; its sha256 must be the recorded one."""

    format_: Literal["peft", "hf", "onnx"] = "onnx"
    """Format to write: peft (the adapter), hf (the merged model) or onnx (the merged model)."""

    output: str | None = path_field()
    """File or folder to write; null writes into the run directory."""

    check_rows: int = field(default=64, metadata={"min": 0})
    """Real rows on which exported and adapter outputs are compared; 0 skips the comparison."""

    task: TaskDataConfig = field(default_factory=TaskDataConfig)


COMMANDS: dict[str, type] = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "predict": PredictConfig,
    "merge": MergeConfig,
    "export": ExportConfig,
}
