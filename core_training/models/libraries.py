"""The heavy libraries, taken out of the garbage collector's way."""

from __future__ import annotations

import functools
import gc

_process_is_ours = False


def own_the_process() -> None:
    """Say that this process is fedloom's: a command or a worker, and no program of a person's own."""
    global _process_is_ours
    _process_is_ours = True


@functools.cache
def settle_libraries() -> None:
    """Import the heavy libraries; in a process of ours, have the garbage collector never look at them again.

    A full collection, which Python makes now and then, would go through all that they hold: a quarter of a second and
    more each time. Call it before any model is there, as what is frozen is never collected.
    """
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import transformers.trainer  # noqa: F401

    if _process_is_ours:
        gc.collect()
        gc.freeze()
