"""Completion of the command line by the shell, which Hydra does once the command is known."""

import os
from collections.abc import Sequence

from lora_cli.config.commands import COMMANDS
from lora_cli.errors import UserError


def complete(requests: Sequence[str]) -> int:
    """Print what the shell asks for.

    Args:
        requests: ``install=bash`` for the script that a shell evaluates; ``query=bash`` is what
            that script asks when TAB is pressed, with the line so far in COMP_LINE.
    """
    from lora_cli.config.launch import run_command

    command = "train"
    is_query = any(request.startswith("query=") for request in requests)
    if is_query:
        line = os.environ.get("COMP_LINE", "")
        words = line.split()
        if len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
            print(" ".join(COMMANDS))
            return 0
        command = words[1]
        if command not in COMMANDS:
            return 0
        # Hydra knows neither our commands and flags nor subjects.
        last = "" if line.endswith(" ") else words.pop()
        rest = [word for word in words[2:] if "=" in word and not word.startswith("-")]
        os.environ["COMP_LINE"] = " ".join(["lora-cli", *rest, last])
    try:
        return run_command(command, requests, ["--shell-completion"], recipe=None, job=lambda _: 0)
    except UserError:
        if is_query:  # an unfinished line is no mistake
            return 0
        raise
