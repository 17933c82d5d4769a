"""The configuration of `lora-cli merge`, and of rows other than those of training."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal

from lora_cli.config.sections import path_field
from lora_cli.config.size import parse_size
from lora_cli.config.tasks import DataConfig
from lora_cli.errors import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskDataConfig:
    """Rows to use instead of those that the adapter was trained and evaluated on."""

    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig:
    """Add adapters into the base weights, or several into one, and write the result."""

    from_: str | None = path_field()
    """Run or adapter directory."""

    adapters: tuple[str, ...] = field(default=(), metadata={"path": True, "text": True})
    """Several run or adapter directories to combine, instead of from."""

    weights: tuple[float, ...] = field(default=(), metadata={"only": {"adapters": ()}})
    """Weight of each of the adapters; empty weighs each with 1."""

    method: Literal[
        "linear", "cat", "svd", "ties", "dare_ties", "dare_linear", "magnitude_prune"
    ] = field(default="linear", metadata={"only": {"adapters": ()}})
    """How to combine; ties arXiv:2306.01708, dare arXiv:2311.03099."""

    density: float = field(
        default=0.5,
        metadata={
            "above": 0,
            "max": 1,
            "only": {
                "adapters": (),
                "method": ("ties", "dare_ties", "dare_linear", "magnitude_prune"),
            },
        },
    )
    """Share of the values of each adapter to keep."""

    majority_sign: Literal["total", "frequency"] = field(
        default="total", metadata={"only": {"adapters": (), "method": ("ties", "dare_ties")}}
    )
    """Sign that wins where adapters disagree: of the sum of values, or of most of them."""

    r: int | None = field(
        default=None, metadata={"min": 1, "only": {"adapters": (), "method": ("svd",)}}
    )
    """Rank of the combined adapter; null takes the largest of the adapters."""

    into: Literal["model", "adapter"] = field(default="model", metadata={"only": {"adapters": ()}})
    """Write the combination as a merged model or as an adapter."""

    seed: int = field(
        default=42,
        metadata={
            "min": 0,
            "max": 2**32 - 1,
            "only": {"adapters": (), "method": ("dare_ties", "dare_linear")},
        },
    )
    """Decides which values are kept."""

    base: str | None = path_field()
    """Where the base model is now, if it has moved; its sha256 must be the recorded one."""

    output: str | None = path_field()
    """Folder for the result; null writes merged/ in the run directory, given one adapter."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"only": {"into": ("model",)}}
    )
    """Number format of the merged weights; auto keeps that of each tensor of the base."""

    max_shard_size: str | None = field(
        default=None, metadata={"text": True, "only": {"into": ("model",)}}
    )
    """Largest file of weights, such as 5GB; null makes the files that the base has."""

    verify: Literal["auto", "logits", "layers", "none"] = field(
        default="auto", metadata={"only": {"into": ("model",)}}
    )
    """What is compared with the adapter: outputs on rows, each tensor; auto goes by the memory."""

    sync: bool = field(default=True, metadata={"only": {"into": ("model",)}})
    """Wait until the disk holds the result; false leaves that to the system, as copying does."""

    check_rows: int = field(default=64, metadata={"min": 0, "only": {"into": ("model",)}})
    """Real rows on which verify=logits compares outputs; with 0, auto compares each tensor."""

    task: TaskDataConfig = field(
        default_factory=TaskDataConfig, metadata={"only": {"into": ("model",)}}
    )


def check_shard_size(config: MergeConfig, _: Collection[str]) -> Iterator[Problem]:
    """Yield a problem if the largest size of a file is none."""
    text = config.max_shard_size
    if text is not None and parse_size(text) is None:
        yield Problem(
            id="config.bad-value",
            message=f'`max_shard_size` must be a size, but is "{text}".',
            key="max_shard_size",
            allowed="a number and KB, MB or GB",
            fix="max_shard_size=5GB",
        )


def check_rows_to_verify(config: MergeConfig, _: Collection[str]) -> Iterator[Problem]:
    """Yield a problem if outputs are to be compared on no rows."""
    if config.verify == "logits" and config.check_rows == 0:
        yield Problem(
            id="config.contradiction",
            message="`check_rows` must be at least 1 with `verify=logits`, but is 0.",
            key="check_rows",
            fix="verify=layers, which needs no rows",
        )
