"""Which values are paths of files, and what a relative one is relative to."""

import os
import re
from pathlib import Path
from typing import Any

_HUB_KEYS = {"model.path", "task.data.path", "base"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_FILE_SUFFIXES = {".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".txt", ".gguf"}


def absolute_path(name: str, value: Any, folder: Path) -> Any:
    """Make the value of a path setting absolute.

    What is no path of a file stays as it is: null, ``-`` for stdin, sources such as ``pkg://...``,
    references, and names of the model hub, which look like paths that do not exist.

    Args:
        name: The setting.
        value: Its value.
        folder: What a relative path is relative to.
    """
    if not isinstance(value, str) or value in {"", "-"} or "://" in value or value[:2] == "${":
        return value
    if Path(value).is_absolute():
        return value
    joined = Path(os.path.normpath(folder.resolve() / value))
    may_be_hub = name in _HUB_KEYS and Path(value).suffix.lower() not in _FILE_SUFFIXES
    if may_be_hub and _HUB_ID.fullmatch(value) and not joined.exists():
        return value
    return str(joined)
