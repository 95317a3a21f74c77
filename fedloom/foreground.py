"""A server or a site in the foreground: attended until it ends, or until this command is stopped, and it with it."""

from __future__ import annotations

from collections.abc import Callable
from subprocess import Popen

from core_training.foundation import background
from core_training.foundation.errors import Interrupted, RunError


def attended(process: Popen[bytes], stop: Callable[[], object], command: str, options: str) -> None:
    """Wait for the process of `fedloom COMMAND start`, then stop what belongs to it.

    Raises Interrupted after a signal, and RunError when the process ended by itself: not where another command
    stopped it.
    """
    number = background.attend(process)
    stop()
    again = f"`fedloom {command} start {options}` goes on with it"
    if number is None and process.returncode == 0:
        return
    if number is None:
        raise RunError(f"the process ended by itself (code {process.returncode}); its log says why, and {again}")
    raise Interrupted(f"stopped, and its runs with it; {again}", number)
