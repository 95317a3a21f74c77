"""`answers.jsonl`: every answer of an evaluation, a line each, appended and flushed, so that it can be gone on with.

A line carries the digest of what it is an answer of: model, task and settings. Others are no answers any more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core_training.foundation.bounded_reading import ForeignTextError, parse_value
from core_training.foundation.durable import commit_file
from core_training.foundation.errors import RunError
from core_training.foundation.strict_json import strict_json
from evaluation.figures.metrics import chosen, confidence
from evaluation.items import Answers, Item, Judged, Measured, Scored, Written

ANSWERS = "answers.jsonl"


class KeptAnswers:
    """The answers in a folder. What is added is on the disk before it counts."""

    def __init__(self, folder: Path, name: str = ANSWERS) -> None:
        self.path = folder / name
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._others = 0
        self._read()

    def _read(self) -> None:
        """Read all lines. The last one, where whoever wrote it was killed on the way, is cut off."""
        self._rows, self._others = {}, 0
        if not self.path.is_file():
            return
        content = self.path.read_bytes()
        lines = content.split(b"\n")
        if lines[-1]:
            os.truncate(self.path, len(content) - len(lines[-1]))
        for line in lines[:-1]:
            try:
                row = parse_value(line)
            except (ForeignTextError, ValueError):
                self._others += 1
                continue
            if isinstance(row, dict) and isinstance(row.get("of"), str):
                self._rows.setdefault(row["of"], []).append(row)

    def keep_only(self, digests: Iterable[str]) -> int:
        """Forget the answers to anything else; returns how many were forgotten."""
        self._read()
        wanted = set(digests)
        lost = self._others + sum(len(rows) for of, rows in self._rows.items() if of not in wanted)
        if lost:
            self._rows = {of: rows for of, rows in self._rows.items() if of in wanted}
            lines = [_line(row) for rows in self._rows.values() for row in rows]
            commit_file(self.path, "".join(lines).encode())
        return lost

    def answers(self, of: str, items: Mapping[str, Item]) -> Answers:
        """What is known already of a model's answers."""
        found = Answers()
        for row in self._rows.get(of, []):
            if row["id"] in items and row["part"] in _READ:
                _READ[row["part"]](row, found)
        return found

    def rows(self, of: str) -> list[dict[str, Any]]:
        """The lines that were there of a digest, as they are."""
        return list(self._rows.get(of, []))

    def values(self, of: str) -> dict[tuple[str, int], float]:
        """The numbers that a judge or a function gave."""
        return {(row["id"], row["sample"]): row["value"] for row in self._rows.get(of, []) if row["part"] == "value"}

    def add(self, of: str, names: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> None:
        """Append answers, `names` being model and task. Raises RunError when the disk refuses."""
        self.add_rows({**names, **row, "of": of} for row in rows)

    def add_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append lines, each with its digest in `of`. Raises RunError when the disk refuses."""
        text = "".join(map(_line, rows))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{self.path} could not be written ({error}); what was there before is intact") from error


def _line(row: Mapping[str, Any]) -> str:
    return strict_json(row, ensure_ascii=False) + "\n"


def scored_row(item: Item, one: Scored) -> dict[str, Any]:
    answer = item.labels[chosen(item, one)] if item.labels else None
    return {
        **_row(item, "choice"),
        "answer": answer,
        "correct": None if item.gold is None else chosen(item, one) == item.gold,
        "confidence": confidence(one),
        "choices": list(item.labels),
        "logps": list(one.logps),
        "tokens": list(one.tokens),
    }


def written_row(item: Item, one: Written) -> dict[str, Any]:
    return {
        **_row(item, "answer"),
        "sample": one.sample,
        "answer": one.text,
        "tokens": one.tokens,
        "ended": one.ended,
    }


def measured_row(item: Item, one: Measured) -> dict[str, Any]:
    loss = one.loss_sum / one.tokens if one.tokens else None
    return {**_row(item, "loss"), "answer": None, "loss": loss, **asdict(one)}


def judged_row(item: Item, one: Judged) -> dict[str, Any]:
    return {
        **_row(item, "rubric"),
        "sample": one.sample,
        "answer": None,
        "met": list(one.met),
        "criteria": [criterion.text for criterion in item.rubric],
    }


def value_row(item: Item, sample: int, name: str, value: float) -> dict[str, Any]:
    return {**_row(item, "value"), "sample": sample, "answer": None, "metric": name, "value": value}


def _row(item: Item, part: str) -> dict[str, Any]:
    return {"id": item.id, "part": part, "prompt": item.question, "expected": item.expected}


def _read_choice(row: Mapping[str, Any], found: Answers) -> None:
    found.scored[row["id"]] = Scored(row["id"], tuple(row["logps"]), tuple(row["tokens"]))


def _read_answer(row: Mapping[str, Any], found: Answers) -> None:
    one = Written(row["id"], row["sample"], row["answer"], row["tokens"], row["ended"])
    found.written[one.id, one.sample] = one


def _read_loss(row: Mapping[str, Any], found: Answers) -> None:
    found.measured[row["id"]] = Measured(row["id"], row["loss_sum"], row["tokens"], row["correct"])


def _read_rubric(row: Mapping[str, Any], found: Answers) -> None:
    found.judged[row["id"], row["sample"]] = Judged(row["id"], row["sample"], tuple(row["met"]))


_READ: dict[str, Callable[[Mapping[str, Any], Answers], None]] = {
    "choice": _read_choice,
    "answer": _read_answer,
    "loss": _read_loss,
    "rubric": _read_rubric,
}


def digest_words(**parts: Any) -> str:
    """What an answer is of, as words for a digest."""
    return json.dumps(parts, sort_keys=True, default=str)
