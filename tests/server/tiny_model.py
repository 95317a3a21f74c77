"""A model of a few thousand weights with a tokenizer of a few dozen words, and texts to train it on."""

import json
from pathlib import Path

SENTENCE = "the patient has fever cough pain in knee heart lung and was given rest water iron salt for two three days"
WORDS = SENTENCE.split()


def make_tiny_model(folder: Path) -> Path:
    """Write the model, with random weights, in the layout that transformers loads."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<unk>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_texts(path: Path, seed: int, count: int = 60) -> Path:
    """Write `count` records `{"text": …}`, other ones for another seed."""
    import random

    draw = random.Random(seed)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randint(4, 12)))}) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path
