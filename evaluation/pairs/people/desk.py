"""What annotators have judged and have yet to: no sockets, no HTML. A verdict is on the disk before it counts."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from typing import Any

from core_training.foundation.bounded_reading import shortened_text
from core_training.foundation.errors import InputError
from evaluation.pairs.contest import Contest
from evaluation.pairs.pair_judges import PEOPLE
from evaluation.pairs.pairwise import Look, Shown, Winner
from evaluation.pairs.people.assignment import shown_to

CHOICES = {1: Winner.FIRST, 2: Winner.SECOND, 0: Winner.TIE}
"""The keys that a person presses."""
_NAME = re.compile(r"\w[\w .@-]{0,39}")


def annotator_names(names: Sequence[str]) -> list[str]:
    """The names, checked. Raises InputError for none, one that is no name, and one given twice."""
    found = [name.strip() for name in names if name.strip()]
    if not found:
        raise InputError("--annotators: give a name at least, such as --annotators alice,bob")
    for name in found:
        if not _NAME.fullmatch(name):
            said = shortened_text(name, 60)
            raise InputError(f"--annotators: '{said}' is no name; it has letters, digits, ' ', '.', '@', '_' and '-'")
        if found.count(name) > 1:
            raise InputError(f"--annotators: {name} is given twice")
    return found


class Annotator:
    """One person: what is to be looked at, in turn, and what was judged. `token` lets the person in."""

    def __init__(self, name: str, shown: Sequence[Shown], contest: Contest) -> None:
        self.name = name
        self.token = secrets.token_urlsafe(24)
        self._shown = shown
        self._kept = contest.kept
        self._judged = {
            number for number, one in enumerate(shown) if name in contest.kept.of(one, PEOPLE)
        }  # what an earlier sitting left

    @property
    def is_done(self) -> bool:
        return len(self._judged) == len(self._shown)

    def state(self, number: int | None = None) -> dict[str, Any]:
        """What the page is to show: look `number`, or the first one that is not judged. No model's name is in it."""
        if number is None:
            number = next((n for n in range(len(self._shown)) if n not in self._judged), None)
        found = {"done": len(self._judged), "total": len(self._shown), "look": None}
        if number is None or not 0 <= number < len(self._shown):
            return found
        one = self._shown[number]
        turns = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in one.item.prompt]
        prompt = turns or [{"role": "user", "content": one.item.plain}]
        return found | {"look": {"number": number, "prompt": prompt, "first": one.texts[0], "second": one.texts[1]}}

    def judge(self, number: int, choice: int) -> None:
        """Write a verdict down. Raises ValueError for a look or a choice that there is not, RunError for the disk's."""
        if not 0 <= number < len(self._shown) or choice not in CHOICES:
            raise ValueError("there is no such look or choice")
        one = self._shown[number]
        self._kept.add(one, Look(*one.key, self.name, CHOICES[choice]), PEOPLE)
        self._judged.add(number)


class Desk:
    """All annotators of a contest."""

    def __init__(self, contest: Contest, names: Sequence[str], *, twice: bool) -> None:
        pairs = contest.differing
        self.annotators = [
            Annotator(name, shown_to(name, place, pairs, twice=twice, seed=contest.seed), contest)
            for place, name in enumerate(names)
        ]
        self._by_token = {_hashed(one.token): one for one in self.annotators}

    def who(self, token: str) -> Annotator | None:
        """The annotator whom a token lets in; looked up by its hash, so that time tells nothing of it."""
        return self._by_token.get(_hashed(token))

    @property
    def is_done(self) -> bool:
        return all(one.is_done for one in self.annotators)

    @property
    def progress(self) -> tuple[int, int]:
        """Looks judged, and all."""
        states = [one.state() for one in self.annotators]
        return sum(one["done"] for one in states), sum(one["total"] for one in states)


def _hashed(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
