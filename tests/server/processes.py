"""What tests do to processes that a lock stands for."""

import os
import signal
from pathlib import Path

from core_training.foundation import background


def kill(lock: Path) -> None:
    """SIGKILL to the process that holds this lock."""
    process = background.owner(lock)
    assert process is not None
    os.kill(process, signal.SIGKILL)
