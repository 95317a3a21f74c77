"""The demo's base model: a tokenizer and a Llama of a million parameters, made and pre-trained on the spot.

It learns the world's language, how questions are put and how answers sound, from ailments that everybody knows.
It never sees a hospital's diseases, so all it can do with a question about one is guess.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import core_training.foundation.environment as environment
from core_training.distributed.launch import opened_engine
from core_training.engine.central import train
from core_training.recipe.reading import load_recipe
from core_training.runs.run_folder import RunFolder
from examples.demo.world import Question, World, write_records
from fedloom.console import ticking

RECIPE = Path(__file__).with_name("pretraining.yaml")
VOCABULARY = 800
END, PADDING = "<end>", "<padding>"

# How a conversation reads for this model. The generation marks say which part is the answer, and so to be learnt.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}Question: {{ message.content }}\nAnswer:{% endif %}"
    "{% if message.role == 'assistant' %}"
    "{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% endif %}"
    "{% endfor %}"
)


def make_base_model(world: World, folder: Path, overrides: list[str] | None = None) -> Path:
    """Make and pre-train the model in `folder`; returns where it lies, in the layout that transformers loads."""
    recipe = load_recipe(RECIPE, overrides)
    run = RunFolder(folder)
    run.prepare(recipe, resume=False)  # first: what is in the folder then is the run's
    texts = [as_text(question) for question in world.common]
    write_records(folder / "texts.jsonl.gz", ({"text": text} for text in texts))
    write_untrained(texts, folder / "untrained", recipe.training.seed)
    with opened_engine(recipe) as engine, ticking("pre-training the base", "step") as ticker:
        train(recipe, engine, run, ticker.advance)
    return folder / "model"


def as_text(question: Question) -> str:
    """A question and its answer as the chat template would write them (pre-training adds the end mark itself)."""
    return f"Question: {question.prompt}\nAnswer: {question.completion}"


def write_untrained(texts: Iterable[str], folder: Path, seed: int) -> None:
    """Write a tokenizer made from the texts, and a Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    environment.silence_libraries()
    tokenizer = _make_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_tokenizer(texts: Iterable[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PADDING, chat_template=CHAT_TEMPLATE
    )
