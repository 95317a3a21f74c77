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
    """Make each of these texts a token of its own. Raises InputError for one that is a token already.

    Those like `<|im_start|>` are special, and so no part of what a person is shown; others, like `<think>`, are text.
    """
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    for token in tokens:
        if token in known:
            raise InputError(f"{_KEY}: {token!r} is a token of this model already; leave it out")
    tokenizer.add_tokens(
        [AddedToken(t, special=t.startswith("<|") and t.endswith("|>"), normalized=False) for t in tokens]
    )


def added_rows(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[int]:
    """The numbers of added tokens."""
    rows = tokenizer.convert_tokens_to_ids(tokens)
    assert isinstance(rows, list)
    return rows


def add_to_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Give the model a row for each of these tokens, which begins as the mean of all rows.

    So it is the same at every site, whatever the seed. Tables that have rows to spare stay as large as they are.
    """
    rows = added_rows(tokenizer, tokens)
    before = _tables(model)[0].weight.shape[0]
    # Not the rows that some tables have to spare.
    used = sorted({row for row in tokenizer.get_vocab().values() if row < before} - set(rows))
    with torch.no_grad():
        means = [
            {name: p[used].float().mean(dim=0) for name, p in table.named_parameters()} for table in _tables(model)
        ]
        if max(rows) >= before:
            model.resize_token_embeddings(max(rows) + 1, mean_resizing=False)
        new = sorted({*rows, *range(before, max(rows) + 1)})  # a tokenizer may know tokens that have no row either
        for table, mean in zip(_tables(model), means, strict=True):
            for name, parameter in table.named_parameters():
                parameter[new] = mean[name].to(parameter)
    setattr(model.get_input_embeddings(), ADDED_ROWS, rows)


def _tables(model: PreTrainedModel) -> list[Any]:
    """The modules with a row for each token."""
    return [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]


def digest_with(digest: str, tokens: list[str]) -> str:
    """The digest of a model of that digest with these tokens."""
    return hashlib.sha256(json.dumps([digest, tokens]).encode()).hexdigest() if tokens else digest
