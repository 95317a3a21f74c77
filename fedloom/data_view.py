"""Records as the model reads them: texts after template and tokenizer, what is learnt of them, and their lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from core_training.data.examples import IGNORED, Example, Tokens
from core_training.data.leaks import Leaks
from core_training.data.mixing import mixed
from core_training.data.rows import pack
from core_training.foundation.foreign_text import printable
from core_training.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from core_training.engine.tokenising import Tokenised

LOST_ANSWERS = 0.05
"""The share of answer tokens lost to `training.max_length` from which on it is worth a warning."""

_BARS = 30


@dataclass
class Lengths:
    """Counts over the records seen; `lengths` are the tokens of each whole sequence."""

    records: dict[str, int] = field(default_factory=lambda: {"train": 0, "held_out": 0})
    lengths: list[int] = field(default_factory=list)
    tokens: int = 0
    learnt: int = 0
    lost: int = 0
    cut: int = 0
    left_out: int = 0
    trained: list[int] = field(default_factory=list)
    """Tokens of each training example, and below its source."""
    sources: list[str] = field(default_factory=list)
    leaks: Leaks = field(default_factory=Leaks)

    def add(self, one: Tokenised) -> None:
        """Count a record."""
        self.records[part_of(one)] += 1
        self.cut += one.truncated
        self.left_out += not one.useful
        self.leaks.add(one.whole, held_out=one.held_out)
        if not one.held_out:
            self.trained += [len(example) for example in one.useful]
            self.sources += [one.record.source] * len(one.useful)
        self.lengths += [len(tokens) for tokens in one.whole.sequences]
        kept = [tokens for example in one.useful for tokens in example.sequences]
        learnt = sum(tokens.loss_tokens for tokens in kept)
        self.tokens += sum(map(len, kept))
        self.learnt += learnt
        self.lost += sum(tokens.loss_tokens for tokens in one.whole.sequences) - learnt

    @property
    def lost_share(self) -> float:
        """The share of the tokens to be learnt that the cut takes."""
        return self.lost / (self.lost + self.learnt) if self.lost + self.learnt else 0.0

    def lines(self, recipe: Recipe, context: int) -> Iterator[str]:
        """The counts for a person, and a histogram of the lengths; `context` is the most that the model looks at."""
        limit = recipe.training.max_length
        total = sum(self.records.values())
        yield f"{total} records: {self.records['train']} to train on, {self.records['held_out']} held out"
        yield f"{self.tokens} tokens, of which {self.learnt} are learnt"
        share = self.cut / total if total else 0.0
        yield (
            f"{self.cut} records ({share:.0%}) cut at {limit} tokens, and with them {self.lost_share:.0%} of what was "
            f"to be learnt; {self.left_out} left out with nothing to learn from"
        )
        trained = self.trained
        if recipe.data.mix and trained:
            kept = mixed(self.sources, recipe.data.mix, recipe.training.seed)
            yield f"data.mix keeps {len(kept)} of {len(trained)} training examples"
            trained = [trained[number] for number in kept]
        if recipe.stage_part.packs and recipe.training.packing is not False and trained:
            room = min(limit, context)
            rows = len(pack(trained, room))
            yield f"packed, where the model can: {rows} rows of {room} tokens, {sum(trained) / (rows * room):.0%} full"
        yield from self._histogram(limit)

    def _histogram(self, limit: int) -> Iterator[str]:
        """Bars of the lengths, each twice as far as the one before."""
        if not self.lengths:
            return
        exponents = np.ceil(np.log2(np.maximum(self.lengths, 1))).astype(int)
        counts = np.bincount(exponents)
        yield "tokens of a sequence:"
        for exponent in range(int(exponents.min()), len(counts)):
            bar = "█" * math.ceil(_BARS * counts[exponent] / counts.max())
            cut = "  ← cut here" if 2 ** (exponent - 1) < limit <= 2**exponent and self.cut else ""
            yield f"  up to {2**exponent:<6} {bar:<{_BARS}} {counts[exponent]}{cut}"


def without_labels(one: Tokenised) -> Tokenised:
    """A prompt as it is: nothing of it is learnt, and a stage that samples marks all of it."""

    def bare(example: Example) -> Example:
        return Example(tuple(Tokens(t.input_ids, np.full_like(t.labels, IGNORED)) for t in example.sequences))

    return replace(one, whole=bare(one.whole), useful=[bare(example) for example in one.useful])


def part_of(one: Tokenised) -> str:
    return "held_out" if one.held_out else "train"


def document_of(one: Tokenised, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A record as one JSON object."""
    return {
        "place": one.record.place,
        "part": part_of(one),
        "dropped": not one.useful,
        "sequences": [
            {
                "text": tokenizer.decode(tokens.input_ids),
                "learnt": tokenizer.decode(tokens.input_ids[_learnt(tokens)]),
                "tokens": len(tokens),
                "learnt_tokens": tokens.loss_tokens,
                "cut": one.truncated,
            }
            for tokens in shown(one)
        ],
    }


def styled(tokens: Tokens, tokenizer: PreTrainedTokenizerBase, *, in_colour: bool) -> Text:
    """A sequence's text, with what is learnt in bold green, and in «…» where there is no colour."""
    text, learnt = Text(), _learnt(tokens)
    edges = [0, *(np.flatnonzero(np.diff(learnt.astype(int))) + 1).tolist(), len(tokens)]
    for start, end in pairwise(edges):
        piece, is_learnt = (
            printable(str(tokenizer.decode(tokens.input_ids[start:end])), kept="\n"),
            learnt[start:end].any(),
        )
        text.append(piece if in_colour or not is_learnt else f"«{piece}»", style="bold green" if is_learnt else "dim")
    return text


def shown(one: Tokenised) -> Sequence[Tokens]:
    """The sequences that the model reads; those of a record that is left out, as it stands."""
    return [tokens for example in one.useful or [one.whole] for tokens in example.sequences]


def _learnt(tokens: Tokens) -> Any:
    learnt = tokens.labels != IGNORED
    learnt[:1] = False  # nothing stands before the first token to say it from
    return learnt
