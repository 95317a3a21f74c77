"""Tokenizers of the four kinds that published models have, trained on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tests import tiny

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"]
_SIZE = 400


def make_tokenizer(kind: str, folder: Path) -> Path:
    """Save a tokenizer of a kind, with a chat template."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](), pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|eos|>"
    )
    fast.chat_template = tiny.CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder


def _texts() -> list[str]:
    return [f"{record['question']} {record['answer']}" for record in tiny.questions(0, 100)]


def _byte_level() -> Tokenizer:
    """As GPT-2's and its many heirs': bytes are letters."""
    return tiny.tiny_tokenizer(_SIZE).backend_tokenizer


def _byte_fallback() -> Tokenizer:
    """As Llama 2's and Mistral's: words begin with ▁, unknown letters are bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    letters = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZE + 256, special_tokens=[*_SPECIAL, "<unk>", *letters], show_progress=False
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def _unigram() -> Tokenizer:
    """As T5's and XGLM's: the likeliest pieces (SentencePiece)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=_SIZE, special_tokens=[*_SPECIAL, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def _word_pieces() -> Tokenizer:
    """As BERT's: whole words, and pieces that go on with ##."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=_SIZE, special_tokens=[*_SPECIAL, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": _byte_level,
    "byte_fallback": _byte_fallback,
    "unigram": _unigram,
    "word_pieces": _word_pieces,
}
