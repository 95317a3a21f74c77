"""The padding token in a configuration, where transformers' code would change a loaded model for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def loading_empties_padding(model: PreTrainedModel) -> bool:
    """Whether this family's code zeroes the padding token's embedding after it was read from a file.

    What is read is flagged, and transformers' initialisation leaves it alone; Youtu's (transformers 5.24) zeroes a row
    by way of a view, which has no such flag. Where embeddings are the output layer, too, that row was trained.
    """
    table = nn.Embedding.from_pretrained(torch.ones(2, 1), padding_idx=0)
    cast("torch.Tensor", table.weight)._is_hf_initialized = True  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]):
        model._init_weights(table)
    return not bool(table.weight.all())
