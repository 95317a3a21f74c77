"""Tokens that a recipe adds to a model: in its tokenizer, and as rows of its embeddings and output layer."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

from core_training.foundation.errors import InputError
from core_training.tuning.added_rows import ADDED_ROWS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_KEY = "model.add_tokens"


def add_to_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Make each of these texts a token of its own. Raises InputError for one that is a token already."""
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    for token in tokens:
        if token in known:
            raise InputError(f"{_KEY}: {token!r} is a token of this model already; leave it out")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])


def add_to_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Give the model a row for each of these tokens, which begins as the mean of all rows.

    So it is the same at every site, whatever the seed. Tables that have rows to spare stay as large as they are.
    """
    rows = tokenizer.convert_tokens_to_ids(tokens)
    assert isinstance(rows, list)
    before = _tables(model)[0].weight.shape[0]
    # Not the rows that some tables have to spare.
    used = sorted({row for row in tokenizer.get_vocab().values() if row < before} - set(rows))
    with torch.no_grad():
        means = [
            {name: p[used].float().mean(dim=0) for name, p in table.named_parameters()} for table in _tables(model)
        ]
        if max(rows) >= before:
            model.resize_token_embeddings(max(rows) + 1, mean_resizing=False)
        for table, mean in zip(_tables(model), means, strict=True):
            for name, parameter in table.named_parameters():
                parameter[rows] = mean[name].to(parameter)
    setattr(model.get_input_embeddings(), ADDED_ROWS, rows)


def _tables(model: PreTrainedModel) -> list[Any]:
    """The modules with a row for each token."""
    return [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]


def digest_with(digest: str, tokens: list[str]) -> str:
    """The digest of a model of that digest with these tokens."""
    return hashlib.sha256(json.dumps([digest, tokens]).encode()).hexdigest() if tokens else digest
