"""Generated texts while they are written."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

# What tokenizers write for the bytes of a character that is not whole yet.
_BROKEN = "\ufffd"


class TextStream:
    """Hands on a text piece by piece, for `generate` of transformers.

    The pieces put together are what `text_of` says of all tokens: what may be the beginning of a
    stop text, or of a character, is held back until more is known, and so is white space.

    Args:
        read: Turns tokens into a text, up to the first stop text.
        stop: The stop texts.
        write: Told of each piece.
    """

    def __init__(
        self,
        read: Callable[[Sequence[int]], str],
        *,
        stop: Sequence[str],
        write: Callable[[str], None],
    ) -> None:
        self._read, self._stop, self._write = read, tuple(stop), write
        self._is_begun = False
        self._tokens: list[int] = []
        self._written = ""

    def put(self, value: torch.Tensor) -> None:
        """Take the next tokens; the first are those of the prompt, which is no part of the text."""
        if not self._is_begun:
            self._is_begun = True
            return
        self._tokens += value.flatten().tolist()
        text = self._read(self._tokens).rstrip(_BROKEN)
        self._show(text[: len(text) - self._held_back(text)].rstrip())

    def end(self) -> None:
        """Hand on what was held back."""
        self._show(self._read(self._tokens))
        self._is_begun, self._tokens, self._written = False, [], ""

    def _show(self, text: str) -> None:
        # Of a text that changes behind its end nothing is taken back: the next piece goes on.
        if text.startswith(self._written) and len(text) > len(self._written):
            self._write(text[len(self._written) :])
            self._written = text

    def _held_back(self, text: str) -> int:
        """Return how many characters at the end may begin a stop text."""
        sizes = [
            size for one in self._stop for size in range(1, len(one)) if text.endswith(one[:size])
        ]
        return max(sizes, default=0)


def stream_to(
    write: Callable[[str], None] | None, read: Callable[[Sequence[int]], str], stop: Sequence[str]
) -> Any:
    """Return a stream for `generate` of transformers, or None where nobody wants to be told."""
    return None if write is None else TextStream(read, stop=stop, write=write)
