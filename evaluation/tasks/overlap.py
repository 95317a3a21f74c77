"""Contamination: which items stand in the records that a run was trained on, found by n-grams of words. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from evaluation.items import Item

N = 13
"""Words of a run of them that two texts have by chance in common hardly ever (Brown et al. 2020, appendix C)."""
LEAST = 5
"""Shorter items say nothing: any text may have such words."""

_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.lower())


class Overlap:
    """The items' n-grams, and which of them training records have. A short item counts with all of its words."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._owners: dict[int, dict[int, list[str]]] = {}
        self.found: set[str] = set()
        self.records = 0
        self.short = 0
        for item in items:
            words = words_of(item.bare_question)
            if len(words) < LEAST:
                self.short += 1
                continue
            length = min(N, len(words))
            for gram in _grams(words, length):
                self._owners.setdefault(length, {}).setdefault(gram, []).append(item.id)

    def read(self, fields: Mapping[str, Any]) -> None:
        """Look at one record that was trained on."""
        self.records += 1
        for text in _texts(fields.values()):
            words = words_of(text)
            for length, owners in self._owners.items():
                for gram in _grams(words, length):
                    self.found.update(owners.get(gram, ()))

    def document(self) -> dict[str, Any]:
        return {
            "items": len(self.found),
            "n": N,
            "records": self.records,
            "too_short": self.short,
            "ids": sorted(self.found)[:20],
        }


def _grams(words: Sequence[str], length: int) -> Iterator[int]:
    return (hash(tuple(words[at : at + length])) for at in range(len(words) - length + 1))


def _texts(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _texts(value.values())
        elif isinstance(value, list | tuple):
            yield from _texts(value)
