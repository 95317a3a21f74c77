"""From tokenised examples to the rows of a batch: packing without cross-talk, padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch

from core_training.data.examples import IGNORED, Row

SEQUENCE_TENSORS = ("input_ids", "labels", "position_ids")
"""The tensors of a batch that have a row for each sequence; the others have one for each row."""


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """The examples of each row: best-fit decreasing, so that rows of `max_length` tokens are nearly full.

    `lengths` are the examples' tokens, each at most `max_length`. Returns lists of indices into it; each example is in
    exactly one row.
    """
    by_room: dict[int, list[list[int]]] = {}
    rooms: list[int] = []  # those of `by_room` with a row, sorted
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, lengths[index])
        if at == len(rooms):
            room, row = max_length, list[int]()
            rows.append(row)
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(at)
        row.append(index)
        left = by_room.setdefault(room - lengths[index], [])
        if not left:
            insort(rooms, room - lengths[index])
        left.append(row)
    return rows


def parts(sizes: Sequence[int], at_once: int) -> list[list[int]]:
    """The rows of a batch that are computed together: of similar size, and with padding at most `at_once` long.

    A row that is longer than that alone is a part of its own. Returns lists of indices into `sizes`.
    """
    found: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        if found and (len(found[-1]) + 1) * sizes[index] <= at_once:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def padded_size(row: Row) -> int:
    """The tokens of a row with all its sequences padded to the longest."""
    sequences = len(row[0].sequences)
    return sequences * max(sum(len(example.sequences[kind]) for example in row) for kind in range(sequences))


COLUMNS = "columns"
"""The rows' further columns in a batch: JSON in bytes, with zeros behind it; shape (rows, bytes)."""


class Collator:
    """Rows to a batch of tensors, padded on the right to the longest sequence.

    A batch of n rows whose examples have k sequences holds k·n sequences: all first ones, then all second ones. The
    examples of a packed row stand one after another, with positions that start again at 0.
    No attention mask is needed: attention is causal, so no token looks at the padding behind it, and restarting
    positions keep packed examples apart in models that derive a block-diagonal mask from them (see `models.reading`).
    """

    def __init__(self, pad_token_id: int) -> None:
        self._pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        kinds = len(rows[0][0].sequences)
        sequences = [[example.sequences[kind] for example in row] for kind in range(kinds) for row in rows]
        length = max(sum(map(len, parts)) for parts in sequences)
        batch = {
            "input_ids": torch.full((len(sequences), length), self._pad_token_id),
            "labels": torch.full((len(sequences), length), IGNORED),
            # The padding goes on counting, so that an unpacked row stays one sequence and needs no mask at all.
            "position_ids": torch.arange(length).repeat(len(sequences), 1),
        }
        for index, parts in enumerate(sequences):
            start = 0
            for tokens in parts:
                end = start + len(tokens)
                batch["input_ids"][index, start:end] = torch.as_tensor(tokens.input_ids)
                batch["labels"][index, start + 1 : end] = torch.as_tensor(tokens.labels[1:])
                batch["position_ids"][index, start:] = torch.arange(length - start)
                start = end
        for name in rows[0][0].numbers:
            batch[name] = torch.tensor([row[0].numbers[name] for row in rows], dtype=torch.float32)
        if width := max(len(row[0].columns) for row in rows):
            padded = b"".join(row[0].columns.ljust(width, b"\0") for row in rows)
            batch[COLUMNS] = torch.from_numpy(np.frombuffer(padded, dtype=np.uint8).copy()).reshape(len(rows), width)
        return batch
