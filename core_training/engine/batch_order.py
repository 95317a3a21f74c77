"""The rows of each batch of an epoch: shuffled from the seed, and in a group shared out evenly.

Every process of a group gets as many batches as the others, and each row is taken once in an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from core_training.recipe.pace import batches_of_an_epoch


@dataclass(frozen=True)
class BatchOrder:
    """The batches of one process. The rows that do not fill a group's last ones are divided evenly.

    Where they are fewer than the processes, they join the batches before.
    """

    rows: int
    batch_size: int
    seed: int
    process: int = 0
    processes: int = 1

    @property
    def batches(self) -> int:
        """Batches of an epoch, at each process."""
        return batches_of_an_epoch(self.rows, self.batch_size, self.processes)

    def epoch(self, number: int) -> list[list[int]]:
        """The epoch's batches, as indices of rows."""
        # In this very order accelerate's seedable sampler shuffles, and so does `transformers.Trainer`.
        generator = torch.Generator().manual_seed(self.seed + number)
        order: list[int] = torch.randperm(self.rows, generator=generator).tolist()
        size, last = self.batch_size * self.processes, self.batches - 1
        return [
            self._share(order[batch * size : (batch + 1) * size if batch < last else None])
            for batch in range(self.batches)
        ]

    def _share(self, rows: Sequence[int]) -> list[int]:
        while len(rows) < self.processes:  # an epoch of fewer rows than processes
            rows = [*rows, *rows]
        start, stop = (len(rows) * process // self.processes for process in (self.process, self.process + 1))
        return list(rows[start:stop])
