"""The batches of a group: every process gets as many as the others, and each row is taken once in an epoch.

accelerate would fill an epoch's last batches with rows from its start; one process alone does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler


class EvenBatches(BatchSampler):  # type: ignore[misc]
    """In turn a batch for each process. The rows that do not fill an epoch's last ones are divided evenly.

    Where they are fewer than the processes, they join the batches before.
    """

    def __init__(self, batches: BatchSampler, processes: int) -> None:
        self._batches = batches
        self._processes = processes

    @property
    def sampler(self) -> Any:
        """Where the rows' order comes from (accelerate sets its epoch)."""
        return self._batches.sampler

    def __len__(self) -> int:
        rows: int = len(self.sampler)
        size: int = self._batches.batch_size * self._processes
        whole, rest = divmod(rows, size)
        return self._processes * max(1, whole + (rest >= self._processes))

    def __iter__(self) -> Iterator[list[int]]:
        rows = list(self.sampler)
        size = self._batches.batch_size * self._processes
        last = len(self) // self._processes - 1
        for step in range(last + 1):
            taken = rows[step * size : (step + 1) * size] if step < last else rows[step * size :]
            while len(taken) < self._processes:  # an epoch of fewer rows than processes
                taken = taken + taken
            for process in range(self._processes):
                yield taken[process * len(taken) // self._processes : (process + 1) * len(taken) // self._processes]
