"""The log of a process that strangers or other parties talk to: harmless text, and no flood of warnings.

What another party sent can be in any message and in any exception; and it can make the same be said for ever.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from core_training.foundation.foreign_text import harmless
from core_training.foundation.seldom import Seldom

_MOST_LETTERS = 20_000
_FILTER = "careful"
_FORMATTER = logging.Formatter()


class Careful(logging.Filter):
    """Makes each record harmless at a handler. Warnings of one place in the code are told a few times, then seldom."""

    def __init__(self) -> None:
        super().__init__()
        self._seldom = Seldom(burst=30, seconds=60)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            untold = self._seldom.untold((record.pathname, record.lineno), time.monotonic())
            if untold is None:
                return False
            _clean(record, f" (and {untold} times more since the last such line)" if untold else "")
        else:
            _clean(record, "")
        return True


def log_carefully() -> None:
    """Make the handlers of this process careful: those that its loggers have now, and the one for those without."""
    known = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    handlers = {handler for logger in known for handler in logger.handlers}
    for handler in handlers | ({logging.lastResort} if logging.lastResort else set()):
        if not any(isinstance(one, Careful) for one in handler.filters):
            handler.addFilter(Careful())


def log_to_stdout() -> None:
    """Have this process log carefully to standard output, which whoever started it leads into a file."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells every request
    log_carefully()


def carefully(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as `logging.config.dictConfig` takes it, with careful handlers."""
    handlers = {
        name: {**handler, "filters": [*handler.get("filters", []), _FILTER]}
        for name, handler in config["handlers"].items()
    }
    return {**config, "filters": {**config.get("filters", {}), _FILTER: {"()": Careful}}, "handlers": handlers}


def _clean(record: logging.LogRecord, more: str) -> None:
    record.msg, record.args = _indented(_message(record)) + more, ()
    record.__dict__.pop("color_message", None)  # uvicorn would show it in place of the message
    if record.exc_info and not record.exc_text:
        record.exc_text = _indented(_FORMATTER.formatException(record.exc_info))


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # its arguments do not fit: that must not end whoever logs
        return str(record.msg)


def _indented(text: str) -> str:
    """The text, harmless. No line of it but the first looks like the beginning of a record."""
    return harmless(text.strip(), _MOST_LETTERS, kept="\n").replace("\n", "\n    ")
