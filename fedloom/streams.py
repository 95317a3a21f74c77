"""Standard input, output and error where whoever started this process has closed them, as cron and daemons do."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

_STREAMS = ("stdin", "stdout", "stderr")


def open_closed_streams() -> None:
    """Let the streams that are closed lead nowhere.

    Otherwise the next file that is opened takes a closed one's number, and what is meant for people is written to it.
    """
    for number, name in enumerate(_STREAMS):
        try:
            os.fstat(number)
        except OSError:
            lead_nowhere(number)
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(nowhere, "r" if name == "stdin" else "w", encoding="utf-8"))


def say(text: str) -> None:
    """Print a last word on standard error, if anybody is there to read it."""
    try:
        print(text, file=sys.stderr, flush=True)  # noqa: T201
    except OSError:
        with suppress(OSError):
            lead_nowhere(sys.stderr.fileno())  # what was not written is not tried again at the end


def why_output_is_lost() -> str | None:
    """Why what was printed on standard output cannot be written, as on a full disk; it leads nowhere then."""
    try:
        print(flush=True)  # noqa: T201 - unbuffered, what could not be written is in no buffer to try again
    except OSError as error:
        lead_nowhere(sys.stdout.fileno())
        return error.strerror
    return None


def lead_nowhere(number: int) -> None:
    """Let nothing more of what is written to a stream be an error: nobody can read it."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, number)  # inheritable, as standard streams are
    if nowhere != number:
        os.close(nowhere)
    else:
        os.set_inheritable(number, True)
