"""Llamas of published shapes with random weights, made on the spot: speed does not depend on what a model knows.

Their tokenizer has a token for each byte, so that a text of n ASCII letters is n tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|padding|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]


@dataclass(frozen=True)
class Shape:
    """The numbers of a Llama, and those of the work it is given."""

    width: int
    layers: int
    heads: int
    key_value_heads: int
    inner_width: int
    vocabulary: int
    tied: bool
    """Whether embeddings and output layer are one matrix."""
    max_length: int
    """The longest row, in tokens."""
    batch_size: int
    records: int
    """Conversations; there are half as many pairs."""
    new_tokens: int
    """The longest answer that is sampled."""

    @property
    def multiplied_parameters(self) -> int:
        """The weights that each token is multiplied with: those of all linear layers, the output layer's too."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self._linear) + self.width * self.vocabulary

    def adapter_parameters(self, rank: int) -> int:
        """The weights of LoRA's factors on all linear layers but the output layer."""
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self._linear)

    @property
    def _linear(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's linear layers: attention's four, and the three of the gated network."""
        shared = self.width // self.heads * self.key_value_heads
        attention = [(self.width, self.width), (self.width, shared), (self.width, shared), (self.width, self.width)]
        return [*attention, *2 * [(self.width, self.inner_width)], (self.inner_width, self.width)]


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 128, 300, True, max_length=64, batch_size=2, records=8, new_tokens=4),
    "small": Shape(512, 4, 8, 8, 1536, 4096, True, max_length=128, batch_size=4, records=16, new_tokens=8),
    # Llama 3.2 1B's and Llama 2 7B's.
    "1b": Shape(2048, 16, 32, 8, 8192, 128_256, True, max_length=1024, batch_size=8, records=128, new_tokens=128),
    "7b": Shape(4096, 32, 32, 32, 11_008, 32_000, False, max_length=1024, batch_size=4, records=48, new_tokens=128),
}


def model_folder(folder: str, shape: str) -> str:
    """Where a shape's model lies in the folder of all that is made here."""
    return str(Path(folder) / "models" / shape)


def make_model(shape: str, folder: str) -> dict[str, Any]:
    """Write a shape's model, in bfloat16; return its size."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    made, tokenizer, to = SHAPES[shape], _tokenizer(), Path(model_folder(folder, shape))
    config = LlamaConfig(
        vocab_size=made.vocabulary,
        hidden_size=made.width,
        intermediate_size=made.inner_width,
        num_hidden_layers=made.layers,
        num_attention_heads=made.heads,
        num_key_value_heads=made.key_value_heads,
        max_position_embeddings=made.max_length * made.batch_size,  # a packed batch may be one row
        tie_word_embeddings=made.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    bytes_written = sum(file.stat().st_size for file in to.iterdir())
    return {"parameters": model.num_parameters(), "bytes": bytes_written}


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    padding, begin, end, *_ = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=padding, bos_token=begin, eos_token=end, chat_template=TEMPLATE
    )
