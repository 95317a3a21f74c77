"""A sequence scorer for architectures of which transformers has no sequence classifier with a `score`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class ScoredModel(PreTrainedModel):
    """The layers of a language model, under the name that they have there, and a `score` of each token."""

    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.base_model_prefix = config.scored_layers
        setattr(self, config.scored_layers, AutoModel.from_config(config, trust_remote_code=False))
        self.score = nn.Linear(config.get_text_config().hidden_size, 1, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Leave it to the layers: transformers looks for it in this file."""
        return True

    def get_input_embeddings(self) -> nn.Module:
        # Of an encoder-decoder that is cut in half, transformers wraps the decoder once more.
        layers: Any = getattr(self.base_model, "decoder", self.base_model)
        embeddings: nn.Module = layers.get_input_embeddings()
        return embeddings

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> SequenceClassifierOutput:
        """`logits` are the scores of all tokens, shape (sequences, length, 1)."""
        hidden = self.base_model(input_ids=input_ids, **kwargs).last_hidden_state
        return SequenceClassifierOutput(logits=self.score(hidden))
