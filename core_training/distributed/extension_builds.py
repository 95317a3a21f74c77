"""The extensions that DeepSpeed compiles at its first use, in a folder that all processes of an account share.

PyTorch marks a build by a file `lock`, and waits for it without an end: also for that of a process that was killed.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import IO

from torch.utils.cpp_extension import get_default_build_root

_mark: IO[bytes] | None = None
"""Open for as long as this process lives: the kernel takes the lock back, however that ends."""


def clear_killed_builds() -> None:
    """Remove the marks of builds that were killed, unless another process that called this may be building now."""
    global _mark
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    with suppress(OSError):  # a folder that cannot be written to has no builds of ours
        root.mkdir(parents=True, exist_ok=True)
        _mark = (root / "fedloom.lock").open("ab")
        with suppress(BlockingIOError):
            fcntl.flock(_mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
                lock.unlink(missing_ok=True)
        fcntl.flock(_mark, fcntl.LOCK_SH)
