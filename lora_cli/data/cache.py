"""Where what was downloaded or made once is kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder behind ``cache://``: set by LORA_CLI_CACHE or XDG_CACHE_HOME, or usual."""
    own = os.environ.get("LORA_CLI_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "lora-cli"
