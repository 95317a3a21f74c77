"""The libraries' exceptions, as errors that a person can act on: what was being done, why it failed, what to do.

PyTorch reports nearly everything as a RuntimeError, so its causes are told apart by its words.
"""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from core_training.foundation.errors import FedloomError, RunError
from core_training.recipe.schema import Recipe

_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "unable to allocate",
    "not enough memory",
    "std::bad_alloc",
    "unable to mmap",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_ASKED = re.compile(r"tried to allocate ([\d.]+ ?[KMGT]?i?B(?:ytes)?)", re.IGNORECASE)
_NO_GRADIENT = "does not require grad"
_LOST_DEVICE = ("CUDA error", "device-side assert", "cuDNN error")
_LOST_PROCESS = ("Connection closed by peer", "Connection reset by peer", "NCCL error", "remote process exited")
_MOST_WORDS = 300


@contextmanager
def explained(during: str, recipe: Recipe) -> Iterator[None]:
    """Raise RunError in place of whatever the libraries raise within the block; see `run_error`."""
    try:
        yield
    except FedloomError:
        raise
    except Exception as error:
        raise run_error(error, during, recipe) from error


def run_error(error: Exception, during: str, recipe: Recipe) -> RunError:
    """One line for `error`, which happened during so-and-so (a noun).

    What others may be told of it names the kind of error alone. The frames that the error came through let go of their
    tensors, so that whoever goes on has the memory.
    """
    walked: BaseException | None = error
    while walked is not None:
        traceback.clear_frames(walked.__traceback__)
        walked = walked.__cause__ or walked.__context__
    text = str(error)
    if is_out_of_memory(error):
        asked = _ASKED.search(text)
        what = f"out of memory in {during}"
        detail = f" (asked for {_size(asked[1])})" if asked else ""
        return RunError(f"{what}{detail}; {_less_memory(recipe)}", public=what)
    if _NO_GRADIENT in text:
        return nothing_trained(recipe)
    what = f"{during} failed ({type(error).__name__})"
    if any(words in text for words in _LOST_PROCESS):
        return RunError(f"{during} failed: another process of the group has ended; it says why itself", public=what)
    words = " ".join(text.split())[:_MOST_WORDS] or "no further word"
    lost = any(words in text for words in _LOST_DEVICE)
    remedy = "its process must start anew" if lost else "--traceback, or a site's logs/worker.log, shows where"
    return RunError(f"{during} failed: {type(error).__name__}: {words}; {remedy}", public=what, process_is_lost=lost)


def nothing_trained(recipe: Recipe) -> RunError:
    """The error of a run whose loss depends on no parameter that it trains."""
    what = (
        f"nothing that is trained enters the loss of stage '{recipe.stage}'; let tuning.{recipe.tuning.mode} reach "
        "layers that it does enter"
    )
    return RunError(what, public=what)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: the machine's, the device's, or what this process may have."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return any(words.lower() in str(error).lower() for words in _OUT_OF_MEMORY)


def _size(words: str) -> str:
    """Bytes in the unit that people read; PyTorch writes some as a long number."""
    number, unit = re.fullmatch(r"([\d.]+) ?(.*)", words).groups()  # type: ignore[union-attr]
    return f"{float(number) / 2**30:.2f} GiB" if unit.lower() in ("", "b", "bytes") else f"{number} {unit}"


def _less_memory(recipe: Recipe) -> str:
    """The keys to lower, with their values."""
    training = recipe.training
    keys = [
        f"training.per_device_train_batch_size ({training.per_device_train_batch_size})",
        f"training.max_length ({training.max_length})",
    ]
    if recipe.stage_part.samples:
        keys.append(f"rollout.max_new_tokens ({recipe.rollout.max_new_tokens})")
    checkpointing = "" if training.gradient_checkpointing else ", or set training.gradient_checkpointing"
    return f"lower {' or '.join(keys)}{checkpointing}"
