"""Every setting of lora-cli: frozen dataclasses that hold each default exactly once.

The string under a field is its `--help` text (read from this file's syntax tree, since Python
does not keep it). A trailing underscore keeps a field from shadowing a Python name: the key of
`from_` is `from`. `metadata` of a field may hold:

* ``min``, ``max``, ``above``, ``below``: bounds of a number (``above`` and ``below`` are strict);
* ``text=True``: the value is taken literally on the command line, whatever characters it has;
* ``path=True``: implies text; a relative path in a recipe is relative to the recipe's folder;
* ``only``: what must be chosen for the setting to be read, as names of other settings with the
  values that will do: ``{"lora.variant": ("vera",)}``; ``()`` stands for any that is not empty;
* ``times``: another setting, and by each of its values the factor of a default that nobody set.

Bounds and flags of a list or mapping are about its items.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


def path_field() -> Any:
    """A file, folder or source that may be left out."""
    return field(default=None, metadata={"path": True, "text": True})


def text_field() -> Any:
    """A name or text that may be left out and is taken literally on the command line."""
    return field(default=None, metadata={"text": True})


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The pretrained base model, whose weights stay frozen."""

    path: str | None = path_field()
    """Hub id, folder, GGUF file, or pkg://package/folder for what an installed package ships."""

    revision: str | None = text_field()
    """Branch, tag or commit on the hub; null takes the default branch."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of frozen weights; auto keeps the stored one. What is trained is float32."""

    quantization: Literal["none", "int8", "nf4"] = field(
        default="none",
        metadata={"only": {"strategy.name": ("lora", "head", "adapter", "prefix")}},
    )
    """Train on linear layers in 8 or 4 bits; merging takes the whole weights (arXiv:2305.14314)."""

    sha256: str | None = text_field()
    """Expected sha256 of the weights; a base with other weights is refused."""

    architecture: str | None = text_field()
    """Expected model type, such as bert; smoke=true goes by it where the model cannot be read."""

    num_layers: int | None = field(default=None, metadata={"min": 1})
    """Expected number of layers, likewise; null is the usual number of the architecture."""

    hub_id: str | None = text_field()
    """Hub name of the same weights, written into adapters so that others can find their base."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStoppingConfig:
    """End the run when the metric has stopped improving."""

    patience: int | None = field(default=None, metadata={"min": 1})
    """Evaluations in a row without improvement that end the run; null never ends it."""

    threshold: float = field(default=0.0, metadata={"min": 0})
    """Smallest change of the metric that counts as improvement."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig:
    """How long to train, in what batches, and when to evaluate and save."""

    epochs: int = field(default=3, metadata={"min": 1})
    """Passes over the training rows."""

    max_steps: int | None = field(default=None, metadata={"min": 1})
    """Optimizer steps to run; used instead of epochs when given."""

    global_batch_size: int = field(default=32, metadata={"min": 1})
    """Rows of one optimizer step, over all processes and micro-batches."""

    micro_batch_size: int | None = field(default=None, metadata={"min": 1})
    """Rows in memory at once on each process; null takes all. Gradients change by dropout alone."""

    eval_batch_size: int = field(default=64, metadata={"min": 1})
    """Rows in memory at once when evaluating."""

    eval_steps: int | Literal["epoch"] = field(default="epoch", metadata={"min": 1})
    """Evaluate every so many optimizer steps, or after every epoch; always at the end."""

    save_steps: int | Literal["epoch"] = field(default="epoch", metadata={"min": 1})
    """Save a checkpoint every so many optimizer steps, or after every epoch; always at the end."""

    keep_checkpoints: int = field(default=2, metadata={"min": 2})
    """Newest checkpoints to keep, besides the best."""

    resume: str = field(default="never", metadata={"path": True, "text": True})
    """auto continues run.dir or starts it; a run or checkpoint folder continues that; or never."""

    max_time: str | float | None = text_field()
    """Stop after so long with all saved, as on a signal: 2h, 90m, 1d12h, or a number of seconds."""

    log_steps: int = field(default=10, metadata={"min": 1})
    """Report loss, learning rate and speed every so many optimizer steps."""

    log_rows: bool = False
    """Write the ids of the rows of every optimizer step to rows.jsonl of the run directory."""

    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Number format of the forward and backward pass (autocast); fp16 needs a GPU."""

    max_grad_norm: float | None = field(default=1.0, metadata={"above": 0})
    """Scale a longer gradient down to this length; null does not."""

    tf32: bool = False
    """Multiply float32 matrices in TF32: faster, three digits; needs a GPU (Ampere or later)."""

    label_smoothing: float = field(
        default=0.0,
        metadata={
            "min": 0,
            "below": 1,
            "only": {
                "task.family": (
                    *("text_classification", "token_classification", "seq2seq"),
                    *("image_classification", "audio_classification"),
                    "speech_recognition_seq2seq",
                )
            },
        },
    )
    """Share of each label that is spread over all labels, in the training loss only."""

    neftune_alpha: float | None = field(
        default=None,
        metadata={"above": 0},
    )
    """Noise on input embeddings in training, such as 5 (NEFTune, arXiv:2310.05914); null is off."""

    ema_decay: float | None = field(
        default=None,
        metadata={
            "above": 0,
            "below": 1,
            "only": {
                "optimizer.name": ("adamw", "sgd", "adafactor", "lion", "adamw_8bit"),
                "lora.variant": ("lora", "dora", "lora_fa", "vera"),
            },
        },
    )
    """Evaluate and save a moving average of the weights with this decay; null is off."""

    gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "only": {
                "strategy.name": ("lora", "full", "top", "bitfit", "lora_then_full", "adapter")
            }
        },
    )
    """Compute activations again going back: less memory, about a third more time."""

    padding_free: bool | Literal["auto"] = "auto"
    """Leave padding out of all blocks of the model in training; auto does so where it can."""

    auto_micro_batch: bool = False
    """When memory runs out, halve the micro-batch and repeat the step; only dropout changes."""

    overfit_rows: int | None = field(default=None, metadata={"min": 1})
    """Train and validate on the same first rows: a sound setup reaches a loss near zero."""

    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where the results go."""

    dir: str | None = path_field()
    """Run directory; null makes one under runs/."""

    name: str | None = text_field()
    """Name of the run directory under runs/; null makes one of task, model and time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """What the trackers call the run."""

    project: str = field(default="lora-cli", metadata={"text": True})
    """Project or experiment that the run belongs to, in trackers that have such."""

    name: str | None = text_field()
    """Name of the run; null takes that of the run directory."""
