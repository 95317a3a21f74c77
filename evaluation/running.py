"""An evaluation carried out: models loaded one after the other, asked what the tasks' metrics need, answers kept."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from core_training.data.examples import Example
from core_training.foundation.errors import InputError
from evaluation.items import Answers, Item, Measured, Sampling, Task
from evaluation.kept_answers import (
    KeptAnswers,
    digest_words,
    measured_row,
    scored_row,
    written_row,
)
from evaluation.measuring import loss_examples, measured
from evaluation.metrics import Part, metric
from evaluation.prompts import continued, opening
from evaluation.results import Grouping, Result, result_of
from evaluation.scoring import Scorer
from evaluation.subjects import Subject, load_subject, run_of
from evaluation.writing import Writer

OnProgress = Callable[[str, int, int], None]
"""Told what is being done, how many items of it are done, and of how many."""


@dataclass(frozen=True)
class Settings:
    """How to evaluate. `max_length` unset: that of the first run among the models, for all of them."""

    sampling: Sampling = field(default_factory=Sampling)
    grouping: Grouping = field(default_factory=Grouping)
    max_length: int | None = None
    base: Path | None = None
    site: str | None = None


@dataclass
class Evaluation:
    """All results, model by model and task by task, and where the answers lie."""

    results: list[Result]
    folder: Path
    notes: list[str]


def evaluate(
    models: Sequence[str], tasks: Sequence[Task], settings: Settings, folder: Path, on_progress: OnProgress
) -> Evaluation:
    """Have each model answer each task, and tell the results; answers that `folder` has already are not asked again.

    Raises InputError for models and items that cannot be evaluated, RunError when a model fails on the way.
    """
    kept = KeptAnswers(folder)
    results: list[Result] = []
    notes: list[str] = []
    asked: list[str] = []
    for name in models:
        subject = load_subject(name, settings.base, settings.site)
        settings = _with_length(settings, subject, models)
        for task in tasks:
            of = _digest(subject, task, settings)
            asked.append(of)
            answers = _Asking(subject, task, settings, kept, of, on_progress).answers()
            results.append(result_of(name, task, answers, settings.grouping))
        del subject
        gc.collect()
    if lost := kept.keep_only(asked):
        notes.append(f"{lost} lines of {kept.path} were answers of other models, tasks or settings, and are removed")
    return Evaluation(results, folder, notes)


def _with_length(settings: Settings, subject: Subject, models: Sequence[str]) -> Settings:
    """The settings with the length at which all models' records are cut."""
    if settings.max_length is not None:
        return settings
    from core_training.recipe.reading import load_recipe

    run = next((run for name in models if (run := run_of(name)) is not None), None)
    length = subject.context if run is None else load_recipe(run / "recipe.yaml").training.max_length
    return replace(settings, max_length=length)


def _digest(subject: Subject, task: Task, settings: Settings) -> str:
    """What the answers are of: the model's weights, the items, and how they are asked."""
    words = digest_words(
        model=subject.digest,
        template=subject.base.chat_template.source or "",
        task=task.name,
        chat=task.chat,
        items=[(item.id, item.prompt, item.plain, item.delimiter, item.choices, item.gold) for item in task.items],
        references=[item.references for item in task.items],
        sampling=asdict(sampling_of(task, settings)),
        length=settings.max_length,
    )
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def sampling_of(task: Task, settings: Settings) -> Sampling:
    """How a task's answers are written: what the task says of it comes first."""
    own = settings.sampling
    return replace(
        own,
        max_tokens=task.max_tokens or own.max_tokens,
        temperature=own.temperature if task.temperature is None else task.temperature,
        stop=task.stop or own.stop,
    )


@dataclass
class _Asking:
    """One model asked one task."""

    subject: Subject
    task: Task
    settings: Settings
    kept: KeptAnswers
    of: str
    on_progress: OnProgress

    def answers(self) -> Answers:
        known = self.kept.answers(self.of, self._items)
        wanted = {metric(name).part for name in self.task.metrics}
        if Part.CHOICE in wanted:
            self._score(known)
        if Part.LOSS in wanted:
            self._measure(known)
        if wanted & {Part.ANSWER, Part.RUBRIC}:
            self._write(known)
        return known

    @property
    def _items(self) -> dict[str, Item]:
        return {item.id: item for item in self.task.items}

    @property
    def _names(self) -> dict[str, str]:
        return {"model": self.subject.name, "task": self.task.name}

    def _label(self, doing: str) -> str:
        return f"{self.task.name}: {Path(self.subject.name).name}: {doing}"

    def _score(self, known: Answers) -> None:
        items = [item for item in self.task.items if item.choices]
        if not items:
            raise InputError(f"{self.task.name}: its items have no choices, which its metrics are of")
        if all(item.id in known.scored for item in items):
            return
        asked = [continued(self.task, item, item.choices, self.subject) for item in items]
        scorer, by_id = Scorer(self.subject), self._items
        for batch in scorer.scored(asked, set(known.scored)):
            self.kept.add(self.of, self._names, [scored_row(by_id[one.id], one) for one in batch])
            known.scored |= {one.id: one for one in batch}
            self.on_progress(self._label("choices"), len(known.scored), len(items))
        if not scorer.shares:
            known.notes.append("this model's cache cannot be shared: each choice was computed with its whole prompt")

    def _measure(self, known: Answers) -> None:
        assert self.settings.max_length is not None
        examples, told = loss_examples(self.task, self.subject, self.settings.max_length)
        known.left_out |= told
        known.measured |= self._losses(examples, set(known.measured))

    def _losses(self, examples: dict[str, Example], known: set[str]) -> dict[str, Measured]:
        """Each item's loss; the pieces of one record are added up, and it is kept when all are there."""
        pieces: dict[str, int] = {}
        for name in examples:
            item_id = name.partition("\n")[0]
            pieces[item_id] = pieces.get(item_id, 0) + 1
        found: dict[str, Measured] = {}
        by_id, done = self._items, len(known)
        for batch in measured(examples, self.subject, known):
            whole = []
            for one in batch:
                before = found.get(one.id, Measured(one.id, 0.0, 0, 0))
                found[one.id] = Measured(
                    one.id, before.loss_sum + one.loss_sum, before.tokens + one.tokens, before.correct + one.correct
                )
                pieces[one.id] -= 1
                whole += [one.id] if not pieces[one.id] else []
            self.kept.add(self.of, self._names, [measured_row(by_id[name], found[name]) for name in whole])
            done += len(batch)
            self.on_progress(self._label("loss"), done, len(examples))
        return found

    def _write(self, known: Answers) -> None:
        items = [item for item in self.task.items if not item.is_text]
        if not items:
            raise InputError(f"{self.task.name}: its items are plain texts, which nobody answers; ask for loss alone")
        writer = Writer(self.subject, sampling := sampling_of(self.task, self.settings))
        prompts = {item.id: opening(self.task, item, self.subject) for item in items}
        by_id, total = self._items, len(items) * sampling.samples
        for batch in writer.written(prompts, known.written.keys()):
            self.kept.add(self.of, self._names, [written_row(by_id[one.id], one) for one in batch])
            known.written |= {(one.id, one.sample): one for one in batch}
            self.on_progress(self._label("answers"), len(known.written), total)
        if writer.cut:
            known.notes.append(f"{writer.cut} prompts lost their beginning: there was no room for them and an answer")


def documents(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The results as JSON has them."""
    return [result.document for result in evaluation.results]
