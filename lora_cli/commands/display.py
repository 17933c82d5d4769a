"""What a command may show; `lora_cli.cli.terminal` does the showing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from lora_cli.training.events import Event

Item = TypeVar("Item")


class Display(Protocol):
    """The terminal, as a command sees it."""

    def note(self, text: str) -> None:
        """Show one line of information, on stderr."""

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        is_result: bool = True,
        are_numbers: bool = True,
    ) -> None:
        """Show a table of text cells; the first column is left-aligned, numbers are right-aligned.

        A result goes to stdout, anything else to stderr.
        """

    def track(self, label: str, items: Sequence[Item]) -> Iterator[Item]:
        """Yield the items, and show how far it is where that takes long."""

    def transfer(self, label: str, num_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """Give a function that is told of bytes as they are done, and show how far it is."""

    def on_event(self, event: Event) -> None:
        """Show what the training loop does: a progress bar, or plain lines."""

    def output(self, text: str) -> None:
        """Write a line of the command's result to stdout."""

    def piece(self, text: str) -> None:
        """Write a part of a line of the command's result to stdout, at once."""

    def result(self, value: dict[str, Any]) -> None:
        """Give the whole result as one JSON object; shown on stdout under `--json`."""
