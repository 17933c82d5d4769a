"""Two processes that find each other as those of torchrun do, forked from this one."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from forked import fork_cli

First = Callable[[], Any]


@dataclass
class Pair:
    """What became of the processes of a run."""

    codes: list[int]
    outputs: list[str]
    seconds: float
    stopped: list[int] = field(default_factory=list)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def as_rank(rank: int, size: int, port: int, first: First) -> First:
    def begin() -> None:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        from lora_cli.training.group import join_group

        join_group.cache_clear()
        first()

    return begin


def run_together(arguments: list[str], cwd: Path, *, firsts: list[First], limit: float) -> Pair:
    """Run a command line in as many processes as there are things to do first.

    One that is stopped is killed once the others have ended.
    """
    port, size = free_port(), len(firsts)
    outputs = [cwd / f"output{rank}.txt" for rank in range(size)]
    for output in outputs:
        output.unlink(missing_ok=True)
    began = time.monotonic()
    # One process alone is started as it always is.
    begins = [
        as_rank(rank, size, port, first) if size > 1 else first for rank, first in enumerate(firsts)
    ]
    children = [
        fork_cli(arguments, cwd=cwd, output=output, first=begin)
        for output, begin in zip(outputs, begins, strict=True)
    ]
    codes: dict[int, int] = {}
    stopped: list[int] = []
    seconds = 0.0
    while len(codes) < size and time.monotonic() - began < limit:
        for child in children:
            pid, status = (
                os.waitpid(child, os.WNOHANG | os.WUNTRACED) if child not in codes else (0, 0)
            )
            if pid and os.WIFSTOPPED(status):
                stopped.append(children.index(child))
                began = time.monotonic()
            elif pid:
                codes[child] = os.waitstatus_to_exitcode(status)
                seconds = time.monotonic() - began
        if stopped and len(codes) == size - len(stopped):
            for rank in stopped:
                os.kill(children[rank], signal.SIGKILL)
        time.sleep(0.01)
    for child in children:
        if child not in codes:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            codes[child] = 999
    texts = [output.read_text() for output in outputs]
    return Pair([codes[child] for child in children], texts, seconds, stopped)


def only(rank: int, first: First) -> list[First]:
    return [first, nothing] if rank == 0 else [nothing, first]


def nothing() -> None:
    """Do nothing first."""
