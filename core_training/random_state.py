"""The random numbers of a run: taken out of the process, put back, and written to a file as plain numbers.

PyTorch's, NumPy's and Python's generators are one for the whole process; a run that is paused must find its own again.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

RandomState = dict[str, Any]
"""Tensors, numbers, and lists of them: what `torch.load(weights_only=True)` reads."""


def random_state() -> RandomState:
    """The state of every generator of this process."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    return {
        "python": [version, list(words), gauss],
        "numpy": [
            torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            numpy["state"]["pos"],
            numpy["has_gauss"],
            numpy["gauss"],
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: RandomState) -> None:
    """Put back what `random_state` took."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    key, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
