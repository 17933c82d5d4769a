"""Settings of `lora-cli export`."""

from dataclasses import dataclass, field
from typing import Literal

from lora_cli.config.merging import TaskDataConfig
from lora_cli.config.sections import path_field


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Write the adapter or the merged model in a format that other programs read."""

    from_: str | None = path_field()
    """Run or adapter directory."""

    base: str | None = path_field()
    """Where the base model is now, if it has moved; its sha256 must be the recorded one."""

    format_: Literal[
        "peft", "hf", "onnx", "onnx-int8", "torch-export", "gguf", "gguf-lora", "ollama"
    ] = "onnx"
    """What to write: peft and gguf-lora are the adapter, all others the merged model."""

    output: str | None = path_field()
    """File or folder to write; null writes into the run directory."""

    gguf_type: Literal["auto", "f32", "f16", "bf16", "q8_0"] = field(
        default="auto", metadata={"only": {"format": ("gguf", "ollama")}}
    )
    """Number format of the weights in a GGUF file; auto keeps the model's."""

    check_rows: int = field(default=64, metadata={"min": 0})
    """Real rows on which exported and adapter outputs are compared; 0 skips the comparison."""

    task: TaskDataConfig = field(default_factory=TaskDataConfig)
