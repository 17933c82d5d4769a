"""The flags of the command line that are no settings: they change how a command talks and ends."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Flags given beside the settings.

    Attributes:
        json: Print the result as one JSON object on stdout.
        quiet: Show warnings and errors only.
        debug: Show tracebacks.
        resume: Continue an unfinished run.
        overwrite: Replace results that exist.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False
    resume: bool = False
    overwrite: bool = False
