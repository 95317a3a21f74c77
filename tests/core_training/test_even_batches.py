"""How the rows of an epoch are shared out among the processes of a group."""

from __future__ import annotations

import pytest
from torch.utils.data import BatchSampler, SequentialSampler

from core_training.groups.even_batches import EvenBatches


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("rows", range(1, 30))
def test_each_row_is_taken_once_and_every_process_has_a_batch_in_every_step(rows, size, processes):
    sampler = BatchSampler(SequentialSampler(range(rows)), size, drop_last=False)
    batches = list(EvenBatches(sampler, processes))
    assert len(batches) == len(EvenBatches(sampler, processes))
    assert len(batches) % processes == 0
    assert all(batches)
    if rows >= processes:
        assert [row for batch in batches for row in batch] == list(range(rows))
    steps = [[row for batch in batches[i : i + processes] for row in batch] for i in range(0, len(batches), processes)]
    alone = [list(range(rows))[i : i + size * processes] for i in range(0, rows, size * processes)]
    if len(alone[-1]) >= processes:
        assert steps == alone
