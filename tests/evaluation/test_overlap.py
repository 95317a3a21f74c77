"""What was trained on is found by the question alone, and what frames all questions finds none."""

from __future__ import annotations

from pathlib import Path

from evaluation.tasks.formats import read_items
from evaluation.tasks.loading import load_task
from evaluation.tasks.overlap import Overlap
from tests.evaluation.test_formats import HARNESS, MEDMCQA, PRO, jsonl

QUESTION = "Which ward of ours takes a child with fever and rash?"
FRAME = "You are given the signs of a patient. Name the ward that is the right one for these signs, and no other."


def found(items, *texts: str) -> set[str]:
    overlap = Overlap(items)
    for text in texts:
        overlap.read({"text": text})
    return overlap.found


def test_a_question_of_11_words_is_found_without_its_choices(tmp_path: Path) -> None:
    assert len(QUESTION.split()) == 11
    trained = f"Quiz. {QUESTION} The one for skin."
    for record in ({**MEDMCQA, "cop": 0}, PRO):
        items = read_items(jsonl(tmp_path / "m.jsonl", {**record, "question": QUESTION})).items
        assert found(items, trained) == {"m:1"}
        assert found(items, "A. Heart B. Lung C. Skin D. Eye Answer: and then something else entirely") == set()


def test_the_words_that_frame_all_questions_find_none(tmp_path: Path) -> None:
    jsonl(
        tmp_path / "w.jsonl",
        {"sign": QUESTION, "ward": "skin"},
        {"sign": "a cough of nine days or more", "ward": "heart"},
    )
    (tmp_path / "w.yaml").write_text(HARNESS + f"description: '{FRAME}'\n")
    (tmp_path / "own.yaml").write_text(
        f"data: w.jsonl\nprompt: '{FRAME} {{{{ sign }}}}'\nchoices: [heart, skin]\nanswer: ward\nsystem: '{FRAME}'\n"
    )
    for name in ("w.yaml", "own.yaml"):
        items = load_task(str(tmp_path / name)).items
        assert found(items, FRAME) == set()
        assert found(items, f"Quiz. {QUESTION}") == {"w:1"}


def test_a_systems_words_are_no_question(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": FRAME}, {"role": "user", "content": QUESTION}]
    items = read_items(jsonl(tmp_path / "c.jsonl", {"prompt": turns, "completion": "Skin."})).items
    assert found(items, FRAME) == set()
    assert found(items, QUESTION) == {"c:1"}
