"""Whether a path is that of an adapter which `lora-cli convert` has to read first."""

from pathlib import Path


def is_foreign(path: Path) -> bool:
    """Whether a file or folder looks like an adapter that `lora-cli convert` reads, by names alone.

    Adapters in the format of PEFT do not count, since they are read as they are.
    """
    if path.is_file():
        return path.suffix == ".safetensors"
    return (path / "adapters.safetensors").is_file()
