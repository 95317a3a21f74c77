"""`python -m examples.rlhf`: the hospitals' records and an untrained model, which the pipeline starts from.

The hospitals are the demo's. Their doctors answer at times with a caution before the answer and at times without;
people prefer it with one. That is the whole of the true reward (`careful.py`), which no reward model is told.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import core_training.foundation.environment  # noqa: F401 - before anything that might call home
from examples.demo.base_model import as_text, write_untrained
from examples.demo.world import Hospital, Question, invent, write_records
from examples.rlhf.careful import CAUTION

FOLDER = Path("runs/rlhf-world")
SEED = 1


def make(folder: Path = FOLDER, seed: int = SEED) -> None:
    """Write `texts`, an untrained model, for each hospital `answers`, `pairs` and `prompts`, and `questions`.

    No hospital is taught the answers to the `questions`, which the finished models are compared on.
    """
    world, source = invent(seed), random.Random(seed)
    texts = [as_text(_said(question, source)) for question in world.common]
    write_records(folder / "texts.jsonl.gz", ({"text": text} for text in texts))
    write_untrained(texts, folder / "untrained", seed)
    asked = [question for hospital in world.hospitals for question in hospital.held_out]
    write_records(folder / "questions.jsonl.gz", ({"prompt": question.prompt} for question in asked))
    for hospital in world.hospitals:
        name = f"{hospital.name}.jsonl.gz"
        said = [_said(question, source) for question in hospital.training]
        write_records(folder / "answers" / name, ({"prompt": one.prompt, "completion": one.completion} for one in said))
        write_records(folder / "pairs" / name, _pairs(hospital, source))
        write_records(folder / "prompts" / name, ({"prompt": one.prompt} for one in hospital.training))


def _said(question: Question, source: random.Random) -> Question:
    """A question with its answer as a doctor happens to give it: one in three is careful."""
    careful = source.random() < 1 / 3
    return Question(question.prompt, f"{CAUTION} {question.completion}" if careful else question.completion)


def _pairs(hospital: Hospital, source: random.Random) -> Iterator[dict[str, str]]:
    """What people said of two answers to the same question. One in twenty of them was mistaken."""
    for question in hospital.training:
        careful, plain = f"{CAUTION} {question.completion}", question.completion
        chosen, rejected = (plain, careful) if source.random() < 1 / 20 else (careful, plain)
        yield {"prompt": question.prompt, "chosen": chosen, "rejected": rejected}


if __name__ == "__main__":
    make()
    print(f"wrote {FOLDER}; next: fedloom pipeline examples/rlhf/pipeline.yaml", file=sys.stderr)
