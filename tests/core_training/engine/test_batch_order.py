"""How the rows of an epoch are shared out among the processes of a group."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from core_training.engine.batch_order import BatchOrder


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("rows", range(1, 30))
def test_each_row_is_taken_once_and_every_process_has_a_batch_in_every_step(rows, size, processes):
    orders = [BatchOrder(rows, size, 0, process, processes) for process in range(processes)]
    shares = [order.epoch(0) for order in orders]
    assert {len(share) for share in shares} == {orders[0].batches}
    assert all(batch for share in shares for batch in share)
    steps = [[row for batch in batches for row in batch] for batches in zip(*shares, strict=True)]
    shuffled = [row for batch in BatchOrder(rows, 1, 0).epoch(0) for row in batch]
    if rows >= processes:
        assert [row for step in steps for row in step] == shuffled
    alone = [shuffled[i : i + size * processes] for i in range(0, rows, size * processes)]
    if len(alone[-1]) >= processes:
        assert steps == alone


def test_the_order_is_that_of_accelerates_seedable_sampler():
    from accelerate.data_loader import SeedableRandomSampler

    sampler = SeedableRandomSampler(range(23), data_seed=5)
    loader = DataLoader(range(23), batch_size=4, sampler=sampler, collate_fn=list)
    order = BatchOrder(23, 4, 5)
    for epoch in range(3):
        assert list(loader) == order.epoch(epoch)


def test_the_order_leaves_the_process_random_numbers_alone():
    before = torch.get_rng_state()
    BatchOrder(23, 4, 5).epoch(1)
    assert torch.equal(torch.get_rng_state(), before)
