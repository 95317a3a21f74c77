"""The random numbers of a run: taken out of the process, put back, and written to a file as plain numbers.

PyTorch's, NumPy's and Python's generators are one for the whole process; a run that is paused must find its own again.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RandomState:
    """The state of every generator of a process, each as its library gives it."""

    python: tuple[Any, ...]
    numpy: Any
    cpu: torch.Tensor
    cuda: torch.Tensor | None
    """The state on the device that this process computes on; a checkpoint may be read on a machine with others."""

    @classmethod
    def present(cls) -> RandomState:
        """The states as they are now. Quick: it is asked for after every step."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def put_back(self) -> None:
        """Have every generator go on from here."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.cuda)

    def plain(self) -> dict[str, Any]:
        """The same as tensors, numbers and lists of them: what `torch.load(weights_only=True)` reads."""
        version, words, gauss = self.python
        name, key, *rest = self.numpy
        numpy = [str(name), torch.from_numpy(key.astype(np.int64)), *rest]
        return {"python": [version, list(words), gauss], "numpy": numpy, "cpu": self.cpu, "cuda": self.cuda}

    @classmethod
    def of_plain(cls, document: dict[str, Any]) -> RandomState:
        """Read what `plain` gave."""
        version, words, gauss = document["python"]
        name, key, *rest = document["numpy"]
        numpy = (name, key.numpy().astype(np.uint32), *rest)
        return cls((version, tuple(words), gauss), numpy, document["cpu"], document["cuda"])
