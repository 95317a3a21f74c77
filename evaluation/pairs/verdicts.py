"""`verdicts.jsonl` and `preferences.jsonl`: what judges said of pairs, and the pairs as stages read them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core_training.data.formats import read_values
from core_training.data.records import Record
from core_training.foundation.durable import commit_file
from core_training.foundation.errors import InputError
from core_training.foundation.strict_json import strict_json
from evaluation.answers.kept_answers import KeptAnswers
from evaluation.pairs.pairwise import Look, Outcome, Shown, Winner

VERDICTS = "verdicts.jsonl"
PREFERENCES = "preferences.jsonl"


class KeptLooks:
    """The looks in a folder. One is on the disk before it counts, and none is ever removed: people's time is in it.

    A look is of two texts under a prompt, by a judge: with other answers, or another judge, it counts no more.
    """

    def __init__(self, folder: Path) -> None:
        self._kept = KeptAnswers(folder, VERDICTS)
        self._new: dict[str, list[Look]] = {}

    def add(self, shown: Shown, look: Look, judge: str, said: str | None = None) -> None:
        """Append a look. Raises RunError when the disk refuses."""
        self.add_all([(shown, look, said)], judge)

    def add_all(self, looks: Sequence[tuple[Shown, Look, str | None]], judge: str) -> None:
        """Append looks in one write. Raises RunError when the disk refuses."""
        rows = [{**_row(shown, look, said), "of": digest(shown, judge)} for shown, look, said in looks]
        self._kept.add_rows(rows)
        for shown, look, _ in looks:
            self._new.setdefault(digest(shown, judge), []).append(look)

    def of(self, shown: Shown, judge: str) -> dict[str, Look]:
        """The looks at a pair in this order, by who looked; the last counts where somebody looked again."""
        of = digest(shown, judge)
        found = {}
        for row in self._kept.rows(of):
            if (look := _look(row, shown)) is not None:
                found[look.by] = look
        return found | {look.by: look for look in self._new.get(of, [])}


def digest(shown: Shown, judge: str) -> str:
    """What a look is of: prompt, both texts in their order, and the judge."""
    words = json.dumps([shown.item.id, shown.item.question, *shown.texts, judge])
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _row(shown: Shown, look: Look, said: str | None) -> dict[str, Any]:
    won = {Winner.FIRST: look.first, Winner.SECOND: look.second}
    return {
        "id": look.item,
        "first": look.first,
        "second": look.second,
        "by": look.by,
        "verdict": look.winner,
        "winner": None if look.winner is None else won.get(look.winner),
        "margin": look.margin,
        "prompt": shown.item.question,
        "answers": list(shown.texts),
        **({} if said is None else {"said": said}),
    }


def _look(row: Mapping[str, Any], shown: Shown) -> Look | None:
    """The look of a line; the names of the models are today's. None for a line that is none."""
    verdict, by, margin = row.get("verdict"), row.get("by"), row.get("margin")
    if not isinstance(by, str) or verdict not in (None, *Winner):
        return None
    winner = None if verdict is None else Winner(verdict)
    return Look(shown.item.id, shown.first, shown.second, by, winner, margin if isinstance(margin, float) else None)


def preferences(pairs: Iterable[tuple[Shown, Outcome]]) -> tuple[list[dict[str, Any]], int]:
    """The pairs with a winner as records of prompt, chosen, rejected and margin; and how many no stage could read.

    A stage cannot read an empty answer, say.
    """
    found: list[dict[str, Any]] = []
    unreadable = 0
    for shown, one in pairs:
        if one.share not in (0.0, 1.0):
            continue
        better, worse = shown.texts if one.share == 1.0 else shown.texts[::-1]
        fields = {"prompt": _prompt(shown), "chosen": better, "rejected": worse, "margin": one.margin}
        if shown.item.tools:
            fields["tools"] = shown.item.tools
        try:
            read_values(Record(fields, Path(PREFERENCES), len(found) + 1), "dpo", {})
        except InputError:
            unreadable += 1
            continue
        found.append(fields)
    return found, unreadable


def _prompt(shown: Shown) -> Any:
    """A single turn of a user's as a text, else the turns."""
    turns = shown.item.prompt
    if not turns:
        return shown.item.plain
    alone = (
        not shown.item.tools
        and len(turns) == 1
        and turns[0].keys() == {"role", "content"}
        and turns[0]["role"] == "user"
    )
    return turns[0]["content"] if alone else turns


def write_preferences(folder: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write the records, a line each. Raises RunError when the disk refuses."""
    target = folder / PREFERENCES
    commit_file(target, "".join(strict_json(record, ensure_ascii=False) + "\n" for record in records).encode())
    return target
