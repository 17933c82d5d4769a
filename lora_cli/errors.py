"""Exceptions that carry what a person needs to act; `lora_cli.cli.render` alone lays them out."""

import difflib
import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong, in the four parts that the terminal shows.

    Attributes:
        id: Stable name, such as ``lora.unmatched-target``.
        message: One complete sentence of the form "`x` must be ..., but is y."
        key: The configuration key at fault, such as ``lora.r``; the terminal adds where it was set.
        where: The place, when it is not a configuration key: a file and row, a folder.
        allowed: What would have been accepted.
        fix: What to do, with a command where there is one.
    """

    id: str
    message: str
    key: str | None = None
    where: str | None = None
    allowed: str | None = None
    fix: str | None = None


class LoraCliError(Exception):
    """Base of every error that lora-cli raises on purpose.

    Attributes:
        exit_code: Exit status of the process when the error reaches the terminal.
        problems: Everything that was found wrong, in the order found.
    """

    exit_code = 1

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(problem.message for problem in self.problems))

    def __reduce__(self) -> tuple[type["LoraCliError"], tuple[tuple[Problem, ...]]]:
        """Tell how to make it again in another process, which Python would get wrong."""
        return type(self), (self.problems,)


class UserError(LoraCliError):
    """It would not start: command line, config, data, model or adapter; nothing was written."""

    exit_code = 2


class RunFailedError(LoraCliError):
    """The run started and failed: diverged, a bad row while streaming, a check after merging."""

    exit_code = 1


class StorageError(LoraCliError):
    """Reading or writing failed: disk full, read-only, I/O error."""

    exit_code = 74


class StoppedError(LoraCliError):
    """The run stopped on request with a checkpoint committed; `--resume` continues it."""

    exit_code = 75


class Interrupted(KeyboardInterrupt):  # nothing went wrong
    """A signal has ended the command before there was anything new to save.

    It is no `Exception`, so that code which works around errors lets it pass.

    Attributes:
        signal: Number of the signal, which ends the process once everything is put away.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


_STORAGE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ESTALE,
    errno.ENXIO,
    errno.ENODEV,
}


def is_storage_error(error: BaseException) -> bool:
    """Whether the system could not read or write a file, for want of room or otherwise."""
    return isinstance(error, OSError) and error.errno in _STORAGE_ERRORS


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """Return the entry of `names` that a typing mistake most likely meant, or None."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None
