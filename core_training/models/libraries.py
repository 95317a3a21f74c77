"""The heavy libraries, taken out of the garbage collector's way."""

from __future__ import annotations

import functools
import gc


@functools.cache
def settle_libraries() -> None:
    """Import the heavy libraries and have the garbage collector never look at them again.

    A full collection, which Python makes now and then, would go through all that they hold: a quarter of a second and
    more each time. Call it before any model is there, as what is frozen is never collected.
    """
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import transformers.trainer  # noqa: F401

    gc.collect()
    gc.freeze()
