"""What `--on` names, as tasks: a file, a folder, a TASK.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core_training.data.records import source_name
from evaluation.formats import Read, read_items
from evaluation.items import Item, Task
from evaluation.metrics import OF_ANSWERS, OF_CHOICES, OF_LOSS, metric

_USUAL = {
    "choice": OF_CHOICES,
    "answer": (*OF_LOSS, *OF_ANSWERS),
    "text": OF_LOSS,
    "rubric": ("rubric", "refusal", "ended", "answer_tokens"),
}


def load_task(on: str, metrics: Sequence[str] = (), limit: int | None = None) -> Task:
    """The task of a file or a TASK.yaml; `metrics` in place of its own. Raises InputError."""
    for name in metrics:
        metric(name)
    read = read_items(on)
    return Task(
        source_name(Path(on)),
        _limited(read, limit),
        tuple(metrics) or _USUAL[read.kind],
        notes=read.notes,
    )


def _limited(read: Read, limit: int | None) -> Sequence[Item]:
    return read.items if limit is None else read.items[:limit]
