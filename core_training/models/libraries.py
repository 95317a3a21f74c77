"""The heavy libraries, imported and then left out of the garbage collector's way."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

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
        _import_libraries_without_bitsandbytes()
        gc.freeze()  # with what little garbage their imports leave: to find it takes a full collection
    finally:
        gc.enable()


def _import_libraries() -> None:
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler  # noqa: F401


def _import_libraries_without_bitsandbytes() -> None:
    """Keep PEFT from importing bitsandbytes, 40 MB, beside every adapter: it would look for layers in four bits.

    Ours are put into four bits after PEFT has seen them (`tuning.four_bits`). What needs the package imports it all the
    same. A program of a person's own may need it in PEFT, too, and is left alone.
    """
    with _unfound("bitsandbytes"):
        _import_libraries()
        from peft.import_utils import is_bnb_4bit_available

        is_bnb_4bit_available()  # PEFT remembers the answer; the other libraries have not asked yet


@contextmanager
def _unfound(package: str) -> Iterator[None]:
    """Have a package that nobody has imported yet look as if it were not installed."""
    if package in sys.modules:
        yield
        return
    cast("dict[str, Any]", sys.modules)[package] = None
    try:
        yield
    finally:
        del sys.modules[package]
