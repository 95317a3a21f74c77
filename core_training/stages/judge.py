"""The interface of what judges sampled answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from core_training.data.examples import Batch
from core_training.data.records import Record


class Judged(NamedTuple):
    """The rewards of a batch of answers, float32 of shape (answers,); `parts` are those of each of several judges."""

    total: torch.Tensor
    parts: Mapping[str, torch.Tensor] = {}


class Judge(Protocol):
    """A judge gives each answer of a batch (see `Sampler.sample`) its reward."""

    room: int
    """The most tokens, prompt and answer together, that it can read."""
    digest: str | None
    """SHA-256 (hex) of a reward model, which sites must have in common. None for a function: it is the site's own."""

    def __call__(self, answers: Batch) -> Judged: ...

    columns: list[str]
    """The columns of a prompt's record that it wants beside prompt and answer; `**` stands for all."""

    def columns_of(self, record: Record) -> bytes:
        """These columns of a record as JSON; empty for none."""
        ...

    def try_out(self, prompts: Sequence[str], columns: Sequence[bytes]) -> None:
        """Look for mistakes before training starts. Raises InputError."""
        ...
