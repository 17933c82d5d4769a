"""Entry point: runs one command line and turns whatever happens into text and an exit code."""

import errno
import gc
import importlib
import importlib.metadata
import logging
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lora_cli.cli.argv import Invocation, split
from lora_cli.cli.completion import complete
from lora_cli.cli.help import command_help, fold, overview
from lora_cli.cli.render import as_json, show_line, show_problems
from lora_cli.config.composed import Composed
from lora_cli.errors import (
    Interrupted,
    LoraCliError,
    Problem,
    StorageError,
    UserError,
    is_storage_error,
)
from lora_cli.log import logger
from lora_cli.ranks import silence, world_size

EXIT_STORAGE = 74
EXIT_BUG = 70


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        argv: Arguments without the name of the program; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_json, is_debug = "--json" in arguments, "--debug" in arguments
    ended_by = int(signal.SIGINT)
    silence()
    with logging_to_stderr(quiet="--quiet" in arguments):
        try:
            code = _run(split(arguments))
            sys.stdout.flush()
        except KeyboardInterrupt as error:
            ended_by = error.signal if isinstance(error, Interrupted) else ended_by
            code = 128 + ended_by
            show_traceback(is_debug)
            show_line("interrupted: nothing new was saved")
        except BrokenPipeError:
            # Whoever read our output has left; the interpreter must not try to flush it again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = EXIT_STORAGE
        except Exception as error:  # noqa: BLE001  # the last line of defence
            show_traceback(is_debug)
            code = _report(error, is_json=is_json)
    if ended_by != signal.SIGINT:
        # Everything is put away: now it does what it does to any program.
        signal.raise_signal(ended_by)
    return code


def _run(invocation: Invocation) -> int:
    if invocation.wants == "version":
        print(f"lora-cli {importlib.metadata.version('lora-cli')}")
        return 0
    if invocation.wants == "completion":
        return complete(invocation.overrides)
    if invocation.command is None:
        print(fold(overview(), shutil.get_terminal_size().columns))
        return 0
    if invocation.wants == "help":
        print(fold(command_help(invocation.command), shutil.get_terminal_size().columns))
        return 0
    return _run_command(invocation, invocation.command)


def _run_command(invocation: Invocation, command: str) -> int:
    if world_size() > 1 and command != "train":
        raise UserError(
            Problem(
                id="cli.one-process",
                message=f"`lora-cli {command}` must run in one process, but was started in"
                f" {world_size()}.",
                where="command line",
                fix=f"start lora-cli {command} without torchrun or accelerate",
            )
        )
    # Hydra takes a quarter of a second to import, and help does not need it.
    from lora_cli.config.launch import run_command

    def job(composed: Composed) -> int:
        options = invocation.options
        with uncollected():
            from lora_cli.cli.terminal import Terminal

            module = importlib.import_module(f"lora_cli.commands.{command}")
        terminal = Terminal(as_json=options.json, quiet=options.quiet)
        try:
            return int(module.run(composed, options, terminal))
        finally:
            terminal.close()

    return run_command(
        command,
        invocation.overrides,
        invocation.hydra_flags,
        recipe=invocation.recipe,
        job=job,
    )


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without looking for garbage, of which there is none, in all that is there already."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _report(error: Exception, *, is_json: bool) -> int:
    """Show an error on stderr, with `--json` on stdout as well, and return the exit code."""
    found = as_error(error)
    show_problems(found.problems)
    if is_json:
        print(as_json(found.problems, found.exit_code))
    return found.exit_code


def as_error(error: Exception) -> LoraCliError:
    """Return what to tell about an error, whoever raised it."""
    if isinstance(error, LoraCliError):
        return error
    if isinstance(error, OSError) and is_storage_error(error):
        place = f" at {error.filename}" if error.filename else ""
        return StorageError(
            Problem(
                id="io.failed",
                message=f"Files must be writable, but there was an I/O error{place}:"
                f" {error.strerror}.",
                fix="free some space or choose another place; `--resume` continues a run",
            )
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UserError(
            Problem(
                id="io.long-name",
                message="A path must be short enough for the file system, but is not:"
                f" {str(error.filename)[:60]}...",
                fix="use a shorter name",
            )
        )
    bug = LoraCliError(
        Problem(
            id="internal",
            message=f"This must not happen, but did: {type(error).__name__}: {error}.",
            fix="this is a bug of lora-cli, please report it; --debug shows the traceback",
        )
    )
    bug.exit_code = EXIT_BUG
    return bug


def show_traceback(is_debug: bool) -> None:
    """Show where the error being handled comes from, if `--debug` asks for it."""
    if is_debug:
        traceback.print_exc()


@contextmanager
def logging_to_stderr(*, quiet: bool) -> Iterator[None]:
    """Send our messages to stderr as they are."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
