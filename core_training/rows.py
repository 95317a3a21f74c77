"""From tokenised examples to the rows of a batch: cutting, packing without cross-talk, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from core_training.stages.base import IGNORED, Example


def truncate(example: Example, max_length: int) -> Example:
    """The first `max_length` tokens."""
    return Example(example.input_ids[:max_length], example.labels[:max_length])


def pack(examples: Sequence[Example], max_length: int) -> list[list[int]]:
    """Which examples share a row: best-fit decreasing, so that rows of `max_length` tokens are nearly full.

    Returns lists of indices into `examples`; each example is in exactly one row.
    """
    by_room: dict[int, list[list[int]]] = {}
    rows: list[list[int]] = []
    for index in sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids)):
        length = len(examples[index].input_ids)
        room = next((r for r in range(length, max_length + 1) if by_room.get(r)), None)
        if room is None:
            row: list[int] = []
            rows.append(row)
            room = max_length
        else:
            row = by_room[room].pop()
        row.append(index)
        by_room.setdefault(room - length, []).append(row)
    return rows


def row_of(examples: Sequence[Example]) -> dict[str, list[int]]:
    """One row holding the examples one after another; positions start again at 0 with each of them."""
    return {
        "input_ids": np.concatenate([e.input_ids for e in examples]).tolist(),
        "labels": np.concatenate([np.append(IGNORED, e.labels[1:]) for e in examples]).tolist(),
        "position_ids": np.concatenate([np.arange(len(e.input_ids)) for e in examples]).tolist(),
    }


class Collator:
    """Rows to a batch of tensors, padded on the right to the longest row.

    No attention mask is needed: attention is causal, so no token looks at the padding behind it, and restarting
    positions keep packed examples apart (transformers derives a block-diagonal mask from them).
    """

    def __init__(self, pad_token_id: int) -> None:
        self._pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": torch.full((len(rows), length), self._pad_token_id),
            "labels": torch.full((len(rows), length), IGNORED),
            # The padding goes on counting, so that an unpacked row stays one sequence and needs no mask at all.
            "position_ids": torch.arange(length).repeat(len(rows), 1),
        }
        for index, row in enumerate(rows):
            size = len(row["input_ids"])
            for name in ("input_ids", "labels", "position_ids"):
                batch[name][index, :size] = torch.as_tensor(row[name])
            last = int(batch["position_ids"][index, size - 1])
            batch["position_ids"][index, size:] = torch.arange(last + 1, last + 1 + length - size)
        return batch
