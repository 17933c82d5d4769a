"""Command lines in forked processes, which spares the seconds of importing, and what they leave."""

import contextlib
import hashlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

# Names of the places in a run where something can be done to it.
Place = tuple[str, int]


def fork_cli(
    arguments: list[str],
    *,
    cwd: Path,
    output: Path,
    first: Callable[[], Any] = lambda: None,
) -> int:
    """Run a command line in a forked process and return its number; `first` is called there."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.setsid()
        os.chdir(cwd)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(descriptor, number)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from lora_cli.cli.main import main

        first()
        code = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """Return the exit code of a process; a signal as a negative number."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_forked(arguments: list[str], *, cwd: Path, first: Callable[[], Any] = lambda: None) -> Any:
    """Run a command line to its end, and return exit code and output."""
    output = cwd / "output.txt"
    output.unlink(missing_ok=True)
    code = wait(fork_cli(arguments, cwd=cwd, output=output, first=first))
    return code, output.read_text()


def at_places(act: Callable[[Place], None], *, ids: Path | None = None) -> None:
    """Call `act` at each place of a run in this process: in a forward pass, beside each write.

    Args:
        act: Gets the name of the place and how often it was reached; the padding trial is none.
        ids: File that gets a line for each optimizer step with the rows that it trains on.
    """
    from transformers import BertModel

    from lora_cli.artifacts import checkpoint, commit, run_dir
    from lora_cli.commands import preparing
    from lora_cli.training import loop

    seen: Counter[str] = Counter()
    patch = pytest.MonkeyPatch()
    choose, is_choosing = preparing.choose_padding, False

    def choose_apart(*args: Any) -> bool:
        nonlocal is_choosing
        is_choosing = True
        try:
            return choose(*args)
        finally:
            is_choosing = False

    patch.setattr(preparing, "choose_padding", choose_apart)

    def reach(name: str) -> None:
        if is_choosing:
            return
        seen[name] += 1
        act((name, seen[name]))

    def around(owner: Any, name: str, *, before: str, after: str | None = None) -> None:
        real = getattr(owner, name)

        @wraps(real)
        def call(*args: Any, **kwargs: Any) -> Any:
            reach(before)
            result = real(*args, **kwargs)
            if after is not None:
                reach(after)
            return result

        patch.setattr(owner, name, call)

    around(BertModel, "forward", before="forward")
    around(commit, "put_in_place", before="commit", after="committed")
    around(checkpoint, "remove_folder", before="rotate")
    around(run_dir, "replace_file", before="file", after="filed")
    if ids is not None:
        rows = loop.step_rows

        def noted(*args: Any, **kwargs: Any) -> Any:
            result = rows(*args, **kwargs)
            with ids.open("a") as file:
                file.write(json.dumps([kwargs["step"], list(result[1])]) + "\n")
            return result

        patch.setattr(loop, "step_rows", noted)


def kill_at(place: Place, *, ids: Path | None = None) -> Callable[[], None]:
    """Return what makes a process kill itself at a place, as `kill -9` does."""

    def act(found: Place) -> None:
        if found == place:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: at_places(act, ids=ids)


def places_of(arguments: list[str], *, cwd: Path) -> list[Place]:
    """Run a command line undisturbed, and return the places that it came by, in order."""
    log = cwd / "places.txt"

    def act(found: Place) -> None:
        with log.open("a") as file:
            file.write(json.dumps(found) + "\n")

    code, output = run_forked(
        arguments, cwd=cwd, first=lambda: at_places(act, ids=cwd / "ids.jsonl")
    )
    assert code == 0, output
    return [(name, number) for name, number in map(json.loads, log.read_text().splitlines())]


def outcome(run: Path, ids: Path) -> dict[str, Any]:
    """Return what must be bit-equal in runs of one configuration, however often they stopped."""
    found: dict[str, Any] = {}
    for folder in ("adapter", "checkpoints"):
        for path in sorted((run / folder).rglob("*")):
            if path.suffix == ".safetensors":
                name = str(path.relative_to(run))
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    record = json.loads((run / "adapter" / "lora_cli.json").read_bytes())
    found["record"] = {name: record[name] for name in ("state", "base", "metrics")}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line.get("event") in ("train", "eval", "base")]
    for line in kept:
        for name in ("samples_per_second", "seconds", "crc32"):
            line.pop(name, None)
    found["metrics"] = kept
    found["rows"] = (run / "rows.jsonl").read_text()
    result = json.loads((run / "result.json").read_bytes())
    names = ("exit_code", "reason", "metric", "base", "adapter", "merged", "steps", "best_step")
    found["result"] = {name: result[name] for name in names}
    found["predictions"] = (run / "predictions" / "validation.jsonl").read_text()
    # A step that was done twice counts as it was done last.
    found["ids"] = dict(json.loads(line) for line in ids.read_text().splitlines())
    return found


def no_leftovers(run: Path) -> bool:
    """Whether nothing is left of what killed processes were writing."""
    names = (".tmp-", ".trash-", ".old-")
    return not [path for path in run.rglob("*") if path.name.startswith(names)]


def committed_steps(run: Path) -> set[int]:
    """Return the steps whose checkpoints verify."""
    from lora_cli.artifacts.checkpoint import list_checkpoints
    from lora_cli.artifacts.commit import DamagedFolderError, verify_folder

    whole = set()
    for step, path in list_checkpoints(run / "checkpoints").items():
        with contextlib.suppress(DamagedFolderError):
            verify_folder(path)
            whole.add(step)
    return whole
