"""The end of a group's process: with its exit code, and at once."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process.

    One of a group does not wait for Python to take everything down: threads of gloo and DeepSpeed that still run
    then abort the process now and then, with all its work done, and the launcher takes that for a failure.
    """
    if "LOCAL_RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
