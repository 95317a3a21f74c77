"""The errors a person can cause and mend.

Every message says what is wrong, where, and what would be right. The command line prints it as one or two lines and
exits with `exit_code`; anything else that is raised is a defect of fedloom and shows its traceback.
"""

import signal

from core_training.foundation.foreign_text import harmless

LONGEST = 2000
"""Letters of a message, which other parties may be sent."""
_MOST_LINES = 10
"""Of a message. Whoever names a value shortens it; this is for what was forgotten, and for paths."""


def _cut(message: str) -> str:
    return harmless(message, LONGEST, kept="\n" if message.count("\n") < _MOST_LINES else "")


class FedloomError(Exception):
    """A failure with a message meant for the person at the keyboard."""

    exit_code = 1

    def __init__(self, message: str, public: str | None = None) -> None:
        """`public` is what other parties may be told of it; None: no more than that there was an error."""
        super().__init__(_cut(message))
        self.public = None if public is None else _cut(public)


class InputError(FedloomError):
    """An input is wrong: a recipe, a file, a record, an argument. Nothing has been started or changed."""

    exit_code = 2


class RunError(FedloomError):
    """A run that had started could not go on. What it committed before is intact.

    `process_is_lost` says that this process can compute no more: it has to be started anew.
    """

    def __init__(self, message: str, public: str | None = None, *, process_is_lost: bool = False) -> None:
        super().__init__(message, public)
        self.process_is_lost = process_is_lost


class VoidRoundsError(RunError):
    """A run ended because too many of its rounds were void: `void_rounds` changed nothing, `counted` did."""

    def __init__(self, message: str, counted: int, void_rounds: int) -> None:
        super().__init__(message)
        self.counted = counted
        self.void_rounds = void_rounds


class DivergedError(RunError):
    """The loss or its gradient is no longer a number. It says nothing of the records, so others may be told."""

    def __init__(self, message: str) -> None:
        super().__init__(message, public=message)


class ProtocolError(FedloomError):
    """A message from another party is not what the protocol allows; it is refused and the run goes on without it.

    `fatal` says that asking the other party again would not help.
    """

    def __init__(self, message: str, *, fatal: bool = False) -> None:
        message = harmless(message)  # it may quote the other party
        super().__init__(message, public=message)
        self.fatal = fatal


class NarrowScaleError(ProtocolError):
    """An update does not fit the scale on which it was to be written: the next one has to be wider."""


class BeyondAnnouncedError(ProtocolError):
    """A site's figures are more than what it announced allows: it may have been started anew, on more records."""


class Interrupted(FedloomError):
    """A signal asked the command to stop; what it had committed is saved, and the message says how to go on."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        """`number` is the signal's; the exit code is the one that a shell gives to whoever ends by it."""
        super().__init__(message)
        self.exit_code = 128 + number
