"""The configuration of each subcommand, put together from the sections."""

from dataclasses import dataclass, field
from typing import Literal

from lora_cli.config.adapters import LoraConfig
from lora_cli.config.chat import TalkConfig
from lora_cli.config.conversion import ConvertConfig
from lora_cli.config.distributed import DistributedConfig
from lora_cli.config.exporting import ExportConfig
from lora_cli.config.extraction import ExtractConfig
from lora_cli.config.generation import GenerationOverrides
from lora_cli.config.media import ZeroShotConfig
from lora_cli.config.merging import MergeConfig, TaskDataConfig
from lora_cli.config.optim import (
    AdafactorConfig,
    AdamW8BitConfig,
    AdamWConfig,
    ConstantConfig,
    CosineConfig,
    LinearConfig,
    LionConfig,
    OptimizerConfig,
    PolynomialConfig,
    ScheduleFreeConfig,
    SchedulerConfig,
    SgdConfig,
)
from lora_cli.config.portability import CheckConfig
from lora_cli.config.sections import (
    ModelConfig,
    RunConfig,
    TrackingConfig,
    TrainerConfig,
    path_field,
    text_field,
)
from lora_cli.config.strategies import (
    AdapterStrategyConfig,
    BitFitStrategyConfig,
    FullStrategyConfig,
    HeadStrategyConfig,
    LoraStrategyConfig,
    LoraThenFullStrategyConfig,
    PrefixStrategyConfig,
    StrategyConfig,
    TopStrategyConfig,
)
from lora_cli.config.task_families import TASKS, TaskConfig
from lora_cli.config.tasks import TextClassificationConfig

# Sections that hold one of several dataclasses: the key that tells which, and its table.
# A task family, strategy, optimizer or schedule is added here and in the module that runs it.
VARIANTS: dict[str, tuple[str, dict[str, type]]] = {
    "task": ("family", TASKS),
    "strategy": (
        "name",
        {
            "lora": LoraStrategyConfig,
            "full": FullStrategyConfig,
            "head": HeadStrategyConfig,
            "top": TopStrategyConfig,
            "bitfit": BitFitStrategyConfig,
            "lora_then_full": LoraThenFullStrategyConfig,
            "adapter": AdapterStrategyConfig,
            "prefix": PrefixStrategyConfig,
        },
    ),
    "optimizer": (
        "name",
        {
            "adamw": AdamWConfig,
            "sgd": SgdConfig,
            "adafactor": AdafactorConfig,
            "lion": LionConfig,
            "schedule_free": ScheduleFreeConfig,
            "adamw_8bit": AdamW8BitConfig,
        },
    ),
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
    """Train an adapter, or the model itself, on labelled rows."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TextClassificationConfig)
    strategy: StrategyConfig = field(default_factory=LoraStrategyConfig)
    lora: LoraConfig = field(
        default_factory=LoraConfig,
        metadata={"only": {"strategy.name": ("lora", "lora_then_full")}},
    )
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)
    scheduler: SchedulerConfig = field(default_factory=LinearConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    run: RunConfig = field(default_factory=RunConfig)

    tracker: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio", "csv"], ...] = ()
    """Programs that record the run besides metrics.jsonl, several at once: [tensorboard,csv]."""

    tracking: TrackingConfig = field(
        default_factory=TrackingConfig, metadata={"only": {"tracker": ()}}
    )

    adapter: str | None = path_field()
    """Run or adapter directory to start from; null starts a new adapter on the base model."""

    adapter_mode: Literal["continue", "merge"] = field(
        default="continue", metadata={"only": {"adapter": ()}}
    )
    """Train that adapter on, or merge it into the base model and start a new one on top."""

    smoke: bool = False
    """Try the recipe in seconds: tiny random model, a few rows, every step, nothing kept."""

    seed: int = field(default=42, metadata={"min": 0, "max": 2**32 - 1})
    """Decides the start of head and adapter, the order of rows, dropout and cut splits."""


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

    generate: bool | None = None
    """Whether texts are written and compared too; null takes task.generate_in_eval of training."""

    generation: GenerationOverrides = field(default_factory=GenerationOverrides)

    zero_shot: ZeroShotConfig = field(default_factory=ZeroShotConfig)

    task: TaskDataConfig = field(default_factory=TaskDataConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig:
    """Predict labels for new rows."""

    from_: str | None = path_field()
    """Run or adapter directory."""

    base: str | None = path_field()
    """Where the base model is now, if it has moved; its sha256 must be the recorded one."""

    input_: str = field(default="-", metadata={"path": True, "text": True})
    """File with the rows (jsonl, csv, tsv, conll, or txt with one text a line); - reads stdin."""

    text: str | None = text_field()
    """One text to predict, instead of input."""

    output: str = field(default="-", metadata={"path": True, "text": True})
    """File for the predictions, one JSON object a line; - writes to stdout."""

    format_: Literal["auto", "jsonl", "csv", "tsv", "txt", "conll"] = "auto"
    """Layout of the input; auto goes by the file name, and takes jsonl for stdin."""

    batch_size: int = field(default=64, metadata={"min": 1})
    """Rows in memory at once."""

    generation: GenerationOverrides = field(default_factory=GenerationOverrides)

    zero_shot: ZeroShotConfig = field(default_factory=ZeroShotConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetsConfig:
    """Show which layers can be adapted, which of them will be, and at what cost."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TextClassificationConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    ranks: tuple[int, ...] = field(default=(4, 8, 16, 32, 64), metadata={"min": 1})
    """Ranks to show the size of the adapter for."""

    num_labels: int = field(default=2, metadata={"min": 1})
    """Number of labels of the head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusConfig:
    """Show how far runs are, how they do, why they ended and how to resume them."""

    from_: str | None = path_field()
    """Run directory, or a folder of them such as runs/, which lists them all."""

    watch: bool = False
    """Show it again and again until the run ends."""

    every: float = field(default=2.0, metadata={"min": 0.1, "max": 3600, "only": {"watch": ()}})
    """Seconds from one look to the next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TasksConfig:
    """List the tasks that have a name: data set, columns, family and metric."""

    search: str | None = text_field()
    """Words that must all be found in what is listed, such as a family, metric or column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelsConfig:
    """List the base models that have a name: hub id, language and size."""

    search: str | None = text_field()
    """Words that must all be found in what is listed, such as a language."""


COMMANDS: dict[str, type] = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "predict": PredictConfig,
    "chat": TalkConfig,
    "merge": MergeConfig,
    "export": ExportConfig,
    "extract": ExtractConfig,
    "targets": TargetsConfig,
    "status": StatusConfig,
    "tasks": TasksConfig,
    "models": ModelsConfig,
    "check": CheckConfig,
    "convert": ConvertConfig,
}
