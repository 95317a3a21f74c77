"""What becomes of freed memory: kept by the C library for later, or given back to the system."""

from __future__ import annotations

import ctypes

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)
_SMALLEST_GIVEN_BACK = 1 << 20
_USUAL = 32 << 20
"""Where glibc's own threshold ends up as soon as a block of that size was freed."""

_is_set = False


def give_back_freed_memory(*, wanted: bool) -> None:
    """Have every block of a megabyte and more go back to the system when it is freed; or, later on, no longer.

    glibc keeps blocks of up to 32 MB, and finds no use for most of them: memory that is aligned, as tensors' is, does
    not fit where memory of the same size was freed. Under gradient checkpointing that is several times what is used.
    To fetch blocks anew costs time. Without effect where the C library is another one.
    """
    global _is_set
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (wanted or _is_set):
        return
    mallopt(_MMAP_THRESHOLD, _SMALLEST_GIVEN_BACK if wanted else _USUAL)
    _is_set = wanted
