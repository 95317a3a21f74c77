"""Tokenised records: sequences with labels, the examples made of them, and the rows that examples share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

IGNORED = -100
"""Label of a token that does not enter the loss, as in PyTorch's cross-entropy."""

_CLOSING = 4
"""Tokens at the end of a turn among which the one that ends it is looked for."""

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Tokens:
    """One sequence. `labels[i]` is `input_ids[i]` where that token is to be learnt (or judged), else IGNORED."""

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def loss_tokens(self) -> int:
        return int((self.labels[1:] != IGNORED).sum())

    def ends_with(self, ends: Collection[int]) -> bool:
        """Whether what is labelled last has one of these tokens; the template may say a little after it.

        True where nothing is labelled.
        """
        labelled = self.labels[self.labels != IGNORED]
        return not len(labelled) or any(int(token) in ends for token in labelled[-_CLOSING:])

    def part(self, start: int, stop: int) -> Tokens:
        return Tokens(self.input_ids[start:stop], self.labels[start:stop])


@dataclass(frozen=True)
class Example:
    """One tokenised record: one sequence, or two that are compared; and the numbers that its loss needs besides."""

    sequences: tuple[Tokens, ...]
    numbers: Mapping[str, float] = field(default_factory=dict)
    columns: bytes = b""
    """Further columns of the record, as JSON, for whoever judges answers."""

    def __len__(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))


Row = tuple[Example, ...]
"""The examples that share a row of a batch."""
