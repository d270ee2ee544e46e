"""Names and sentences as a terminal may have them: a file name can hold escape sequences, and bytes that are no text."""

from __future__ import annotations

import os
from typing import TextIO


def shown(text: str, allowed: str = "") -> str:
    """Return a text with U+FFFD in the place of control characters, line ends among them, and of bytes that were no text.

    Args:
        text: of any characters, lone surrogates among them.
        allowed: control characters that stay.
    """
    return "".join(c if c.isprintable() or c in allowed else "\N{REPLACEMENT CHARACTER}" for c in text)


def printable(content: bytes) -> str:
    """Return bytes as text for a terminal: UTF-8 where it is, and no control characters but newline and tab."""
    text = content.decode("utf-8", errors="replace")
    return shown(text, allowed="\n\t")


def nearby(path: str) -> str:
    """Return a path as a sentence has it: relative to the working directory where it lies in it."""
    if not os.path.isabs(path):
        return path
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative


def write_nowhere(stream: TextIO) -> None:
    """Let a stream that cannot be written to end in nothing.

    What is left in its buffer has to go somewhere, or the interpreter complains when it ends, and exits with a code of its own.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class Unbreakable:
    """A text stream that may go away, as a pipe to ``head`` does: what is written then is lost, and nothing is raised.

    Attributes:
        lost: whether it has gone away.
    """

    def __init__(self, stream: TextIO) -> None:
        """Write to a stream for as long as it takes what is written."""
        self._stream = stream
        self.lost = False

    @property
    def encoding(self) -> str:
        """The encoding of the stream."""
        return self._stream.encoding

    def isatty(self) -> bool:
        """Return whether the stream is a terminal that is still there."""
        return not self.lost and self._stream.isatty()

    def fileno(self) -> int:
        """Return the descriptor of the stream."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write a text, and return its length."""
        if not self.lost:
            try:
                self._stream.write(text)
            except OSError:
                self._lose()
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        if not self.lost:
            try:
                self._stream.flush()
            except OSError:
                self._lose()

    def _lose(self) -> None:
        self.lost = True
        write_nowhere(self._stream)
