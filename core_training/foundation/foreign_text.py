"""Text that others wrote, made fit for a log, an event, a terminal.

A control character would act on a terminal instead of being shown, a line break could pass for a line of one's own,
and nobody bounds what a stranger writes.
"""

from __future__ import annotations

MOST_LETTERS = 1_000


def printable(text: str, kept: str = "") -> str:
    """The text with a space for each letter that is not printable, unless it is one of `kept`."""
    return "".join(letter if letter.isprintable() or letter in kept else " " for letter in text)


def harmless(text: str, most: int = MOST_LETTERS, kept: str = "") -> str:
    """The text, `printable` and of at most `most` letters: of those beyond, the number is told.

    A text that was made harmless stays as it is.
    """
    shown = printable(text[:most], kept)
    if len(text) <= most:
        return shown
    left_out = f" … ({len(text) - most} letters left out)"
    return shown[: most - len(left_out)] + left_out
