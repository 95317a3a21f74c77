"""Answers are read as an evaluation keeps them, those of one model on one task, and what is none is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core_training.foundation.errors import InputError
from evaluation.answers.kept_answers import KeptAnswers, measured_row, written_row
from evaluation.bridges.answer_rows import AnswerRow, read_answers
from evaluation.items import Written
from tests.evaluation.bridge_rows import item


def lines(folder: Path, *rows: Any) -> Path:
    path = folder / "answers.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(identifier: str = "a", **more: Any) -> dict[str, Any]:
    return {"id": identifier, "prompt": "q", "answer": "yes", "expected": "no", **more}


def test_what_an_evaluation_keeps_is_read_back(tmp_path: Path) -> None:
    from evaluation.items import Measured

    asked = item("one", "What?", "This.")
    kept = KeptAnswers(tmp_path)
    for model in ("m", "other"):
        rows = [written_row(asked, Written("one", sample, f"{model} says {sample}", 3, True)) for sample in (0, 1)]
        kept.add("digest", {"model": model, "task": "t"}, [*rows, measured_row(asked, Measured("one", 1.0, 2, 1))])
    assert read_answers(tmp_path, "m", "t") == [
        AnswerRow("one", sample, "What?", f"m says {sample}", "This.", "m", "t") for sample in (0, 1)
    ]


def test_a_choice_counts_as_its_label(tmp_path: Path) -> None:
    path = lines(tmp_path, row(part="choice", answer="B", expected="A"), row(part="value", answer=None, value=1.0))
    assert [(one.answer, one.expected) for one in read_answers(path)] == [("B", "A")]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "there are no answers in words"),
        ([row(part="loss", answer=None)], "there are no answers in words"),
        ([row(), "{nonsense"], "line 2: not valid JSON"),
        ([row(), "[1]"], r"line 2: \[1\] is no answer"),
        ([row(prompt=7)], "line 1: prompt is 7; it has to be text"),
        ([row(expected=3)], "line 1: expected is 3"),
        ([row(sample="x")], "line 1: sample is 'x'"),
        ([row(), row()], "'a' has two answers of number 0"),
        ([row("a", model="m"), row("b", model="n")], r"answers of 2 models lie there \(m, n\); name one"),
        ([row("a", task="t"), row("b", task="u")], r"answers of 2 tasks lie there \(t, u\); name one"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, rows: list[Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_answers(lines(tmp_path, *rows))


def test_a_model_without_answers_is_named(tmp_path: Path) -> None:
    lines(tmp_path, row(model="m", task="t"))
    with pytest.raises(InputError, match="no answers in words of model n of task t"):
        read_answers(tmp_path, "n", "t")


def test_a_folder_without_answers_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"answers\.jsonl: No such file.*; name the folder of an evaluation"):
        read_answers(tmp_path)
