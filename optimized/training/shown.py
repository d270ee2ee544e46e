"""Names and sentences as a terminal may have them: a file name can hold escape sequences, and bytes that are no text."""

from __future__ import annotations


def shown(text: str, allowed: str = "") -> str:
    """Return a text with U+FFFD in the place of control characters, line ends among them, and of bytes that were no text.

    Args:
        text: of any characters, lone surrogates among them.
        allowed: control characters that stay.
    """
    return "".join(c if c.isprintable() or c in allowed else "\N{REPLACEMENT CHARACTER}" for c in text)
