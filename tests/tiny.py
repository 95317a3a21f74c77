"""A language model small enough for a unit test, its tokenizer, and questions to train on; all made from a seed."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import core_training.foundation.environment  # noqa: F401

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from core_training.data.examples import Row
    from core_training.recipe.schema import Recipe
    from core_training.stages.base import Stage

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

ORGANS = ["heart", "lung", "liver", "skin", "eye", "ear", "bone", "blood", "brain", "nerve"]
SIGNS = ["fever", "cough", "pain", "rash", "fatigue", "swelling", "itching", "bleeding", "tremor", "nausea"]


def questions(seed: int, count: int) -> list[dict[str, str]]:
    """Made-up questions and answers; different seeds give different ones."""
    records = []
    for i in range(count):
        organ, sign = ORGANS[(i + seed) % 10], SIGNS[(i // 10 + 3 * seed) % 10]
        records.append(
            {"question": f"Case {seed}-{i}: {sign} of the {organ}?", "answer": f"See the {organ} ward: {sign}."}
        )
    return records


def texts(seed: int, count: int) -> list[dict[str, str]]:
    """The same as plain text, for pre-training."""
    return [{"text": f"{record['question']} {record['answer']}"} for record in questions(seed, count)]


def write_jsonl(path: Path, records: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def tiny_tokenizer(vocabulary: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{r['question']} {r['answer']}" for r in questions(0, 100)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|eos|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(folder: Path, vocabulary: int = 400, width: int = 32) -> Path:
    """Save a Llama of two layers with random weights and a byte-level tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fast = tiny_tokenizer(vocabulary)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def said(values: Any) -> dict[str, Any]:
    """What a record says, by the names of its parts."""
    return {part.name: value for part in fields(values) if (value := getattr(values, part.name)) is not None}


def stage_of(recipe: Recipe) -> Stage[Any]:
    """The recipe's stage on its base model."""
    from core_training.models.base_model import BaseModel
    from core_training.stages.base import load_stage

    return load_stage(recipe, BaseModel(recipe))


def token_ids(row: Row) -> tuple[int, ...]:
    """The tokens of a row of single sequences."""
    return tuple(token for example in row for token in example.sequences[0].input_ids.tolist())
