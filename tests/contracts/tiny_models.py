"""Models of a few thousand weights, made from a seed in memory, on which a library's behaviour is looked at."""

from __future__ import annotations

from typing import Any

import core_training.foundation.environment  # noqa: F401  # isort: skip - before the libraries are imported
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCABULARY = 120
PAD, BOS, EOS = 0, 1, 2


def llama(**settings: Any) -> Any:
    """A Llama of two layers, in evaluation mode."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,  # so that what should make a difference does
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(sizes | settings))).eval()


def gpt2(**settings: Any) -> Any:
    """A GPT-2 of two layers, with biases, in evaluation mode."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.3,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**(sizes | settings))).eval()


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Tokens none of which is special, of shape (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(EOS + 1, VOCABULARY, (rows, length), generator=generator)


def classifier(model: Any) -> Any:
    """As core_training/models/heads.py makes one."""
    model.config.num_labels = 1
    with torch.device("meta"):
        made = AutoModelForSequenceClassification.from_config(model.config)
    setattr(made, made.base_model_prefix, getattr(model, model.base_model_prefix))
    made.score = nn.Linear(16, 1, bias=False)
    return made.eval()
