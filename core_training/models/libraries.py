"""The heavy libraries, imported and then left out of the garbage collector's way."""

from __future__ import annotations

import functools
import gc

import core_training.foundation.environment  # noqa: F401 - before PyTorch is imported

_process_is_ours = False


def own_the_process() -> None:
    """Say that this process is fedloom's: a command or a worker, and no program of a person's own."""
    global _process_is_ours
    _process_is_ours = True


def process_is_ours() -> bool:
    """Whether that was said."""
    return _process_is_ours


@functools.cache
def settle_libraries() -> None:
    """Import the heavy libraries; in a process of ours, have the garbage collector never look at them.

    A full collection, which Python makes now and then, goes through all that they hold: a quarter of a second and more
    each time, and several while they are imported. Call it before anything else imports them, which is when it spares
    most, and before any model is there, as what is frozen is never collected.
    """
    if not _process_is_ours:
        _import_libraries()
        return
    gc.disable()
    try:
        _import_libraries()
        gc.freeze()  # with what little garbage their imports leave: to find it takes a full collection
    finally:
        gc.enable()


def _import_libraries() -> None:
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler  # noqa: F401
