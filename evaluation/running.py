"""An evaluation carried out: models loaded one after the other, asked what the tasks' metrics need, answers kept."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from core_training.data.examples import Example
from core_training.foundation.errors import InputError
from core_training.recipe.reading import load_recipe
from evaluation.answers.judging import (
    RewardModel,
    RubricJudge,
    function_digest,
    load_own,
    own_values,
)
from evaluation.answers.kept_answers import (
    KeptAnswers,
    digest_words,
    judged_row,
    measured_row,
    scored_row,
    value_row,
    written_row,
)
from evaluation.answers.measuring import loss_examples, measured
from evaluation.answers.prompts import continued, opening
from evaluation.answers.scoring import Scorer
from evaluation.answers.subjects import Subject, load_subject, run_of
from evaluation.answers.writing import Writer
from evaluation.figures.comparisons import Comparison, compared
from evaluation.figures.metrics import REWARD, Part, is_own, metric
from evaluation.figures.results import Grouping, Result, result_of
from evaluation.items import Answers, Item, Measured, Sampling, Task
from evaluation.tasks.overlap import Overlap
from evaluation.tasks.run_records import trained_records

OnProgress = Callable[[str, int, int], None]
"""Told what is being done, how many items of it are done, and of how many."""


@dataclass(frozen=True)
class Settings:
    """How to evaluate. `max_length` unset: that of the first run among the models, for all of them.

    `reward` is a run of stage reward, `judge` a model that judges rubrics; `overlap` looks for the items in the records
    that runs were trained on.
    """

    sampling: Sampling = field(default_factory=Sampling)
    grouping: Grouping = field(default_factory=Grouping)
    max_length: int | None = None
    base: Path | None = None
    site: str | None = None
    reward: Path | None = None
    judge: str | None = None
    overlap: bool = True


@dataclass
class Evaluation:
    """All results, model by model and task by task, and where the answers lie."""

    results: list[Result]
    comparisons: list[Comparison]
    folder: Path
    notes: list[str]

    def document(self) -> dict[str, Any]:
        """The results as JSON has them."""
        found: dict[str, Any] = {"results": [result.document for result in self.results]}
        if self.comparisons:
            found["comparisons"] = [comparison.document() for comparison in self.comparisons]
        return found | {"folder": str(self.folder)}


@dataclass
class _Asked:
    """What one model gave on one task, and under which digest it is kept."""

    model: str
    task: Task
    of: str
    answers: Answers
    more: dict[str, Any] = field(default_factory=dict)


def evaluate(
    models: Sequence[str],
    tasks: Sequence[Task],
    settings: Settings,
    folder: Path,
    on_progress: OnProgress = lambda *_: None,
    against: Sequence[str] = (),
    load: Callable[[str], Subject] | None = None,
) -> Evaluation:
    """Have each model answer each task, and tell the results; answers that `folder` has already are not asked again.

    `load` loads a model by its name, where that is no path.

    Raises InputError for models and items that cannot be evaluated, RunError when a model fails on the way.
    """
    _check_judge(tasks, settings)
    names = list(dict.fromkeys([*models, *against]))
    own = {name: load_own(name) for task in tasks for name in task.metrics if is_own(name)}
    kept = KeptAnswers(folder)
    asked: list[_Asked] = []
    for name in names:
        subject = load(name) if load is not None else load_subject(name, settings.base, settings.site)
        settings = _with_length(settings, subject, names)
        reward = RewardModel(settings.reward, subject) if settings.reward is not None else None
        for task in tasks:
            asking = _Asking(subject, task, settings, kept, _digest(subject, task, settings), on_progress)
            asked.append(_Asked(name, task, asking.of, asking.answers(reward, own)))
        del subject, reward
        gc.collect()
    digests = {one.of for one in asked} | {of for one in asked for of in one.answers.kept_under}
    digests |= _judge_rubrics(asked, settings, kept, on_progress)
    if settings.overlap:
        _look_for_overlap(asked, on_progress)
    notes = []
    if lost := kept.keep_only(digests):
        notes.append(f"{lost} lines of {kept.path} were answers of other models, tasks or settings, and are removed")
    results = [result_of(one.model, one.task, one.answers, settings.grouping) for one in asked]
    for result, one in zip(results, asked, strict=True):
        result.document |= one.more
    return Evaluation(results, compared(results, models, against), folder, notes)


def _check_judge(tasks: Sequence[Task], settings: Settings) -> None:
    """Raise InputError for a task of rubrics without anybody to judge."""
    wanted = next((task for task in tasks if any(metric(name).part is Part.RUBRIC for name in task.metrics)), None)
    if wanted is not None and settings.judge is None:
        raise InputError(f"{wanted.name}: a model judges its rubrics; name one with --judge RUN|MODEL")
    if wanted is not None and not any(item.rubric for item in wanted.items):
        raise InputError(f"{wanted.name}: its items have no rubrics, which the metric rubric is of")


def _with_length(settings: Settings, subject: Subject, models: Sequence[str]) -> Settings:
    """The settings with the length at which all models' records are cut."""
    if settings.max_length is not None:
        return settings
    run = next((run for name in models if (run := run_of(name)) is not None), None)
    length = subject.context if run is None else load_recipe(run / "recipe.yaml").training.max_length
    return replace(settings, max_length=length)


def _digest(subject: Subject, task: Task, settings: Settings) -> str:
    """What the answers are of: the model's weights, the items, and how they are asked."""
    words = digest_words(
        model=subject.digest,
        name=subject.name,
        template=subject.base.chat_template.source if subject.has_template else "",
        task=task.name,
        chat=task.chat,
        items=[(item.id, item.prompt, item.plain, item.delimiter, item.choices, item.gold) for item in task.items],
        references=[item.references for item in task.items],
        sampling=asdict(sampling_of(task, settings)),
        length=settings.max_length,
    )
    return _short(words)


def _short(words: str) -> str:
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()[:16]


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

    def answers(self, reward: RewardModel | None, own: Mapping[str, Any]) -> Answers:
        known = self.kept.answers(self.of, self._items)
        wanted = {metric(name).part for name in self.task.metrics}
        if Part.CHOICE in wanted:
            self._score(known)
        if Part.LOSS in wanted:
            self._measure(known)
        if wanted & {Part.ANSWER, Part.RUBRIC}:
            self._write(known)
            for name in self.task.metrics:
                if name == REWARD and reward is not None:
                    self._reward(known, reward)
                elif is_own(name):
                    self._own(known, name, own[name])
        return known

    @property
    def _items(self) -> dict[str, Item]:
        return {item.id: item for item in self.task.items}

    def _names(self, **more: str) -> dict[str, str]:
        return {"model": self.subject.name, "task": self.task.name, **more}

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
            self.kept.add(self.of, self._names(), [scored_row(by_id[one.id], one) for one in batch])
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
            self.kept.add(self.of, self._names(), [measured_row(by_id[name], found[name]) for name in whole])
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
        for batch in writer.written(prompts, set(known.written)):
            self.kept.add(self.of, self._names(), [written_row(by_id[one.id], one) for one in batch])
            known.written |= {(one.id, one.sample): one for one in batch}
            self.on_progress(self._label("answers"), len(known.written), total)
        if writer.cut:
            known.notes.append(f"{writer.cut} prompts lost their beginning: there was no room for them and an answer")

    def _reward(self, known: Answers, reward: RewardModel) -> None:
        of = self._under(known, reward.digest)
        found = known.values.setdefault(REWARD, self.kept.values(of))
        left = [one for key, one in known.written.items() if key not in found]
        by_id = self._items
        for batch in reward.values(self.task, by_id, left):
            rows = [value_row(by_id[one.id], one.sample, REWARD, value) for one, value in batch]
            self.kept.add(of, self._names(judge=str(self.settings.reward)), rows)
            found |= {(one.id, one.sample): value for one, value in batch}
            self.on_progress(self._label("rewards"), len(found), len(known.written))

    def _own(self, known: Answers, name: str, function: Any) -> None:
        """A function is asked of all answers anew: it costs little, and may look at them together."""
        of, by_id, written = self._under(known, function_digest(name) + name), self._items, list(known.written.values())
        values = own_values(function, by_id, written)
        known.values[name] = {(one.id, one.sample): value for one, value in zip(written, values, strict=True)}
        if self.kept.values(of) != known.values[name]:
            rows = [value_row(by_id[one.id], one.sample, name, v) for one, v in zip(written, values, strict=True)]
            self.kept.add(of, self._names(), rows)

    def _under(self, known: Answers, judge: str) -> str:
        of = _short(f"{self.of}\n{judge}")
        known.kept_under.add(of)
        return of


def _judge_rubrics(asked: Iterable[_Asked], settings: Settings, kept: KeptAnswers, on_progress: OnProgress) -> set[str]:
    """Have the judge look at all answers to items with rubrics; returns the digests of its verdicts."""
    wanted = [one for one in asked if any(metric(name).part is Part.RUBRIC for name in one.task.metrics)]
    if not wanted or settings.judge is None:
        return set()
    subject = load_subject(settings.judge, settings.base)
    judge, digests = RubricJudge(subject, settings.sampling.seed), set()
    for one in wanted:
        items = {item.id: item for item in one.task.items if item.rubric}
        of = _short(f"{one.of}\n{subject.digest}")
        digests.add(of)
        one.answers.judged |= kept.answers(of, items).judged
        left = [w for key, w in one.answers.written.items() if key not in one.answers.judged and w.id in items]
        for verdicts in judge.judged(items, left):
            names = {"model": one.model, "task": one.task.name, "judge": settings.judge}
            kept.add(of, names, [judged_row(items[verdicts.id], verdicts)])
            one.answers.judged[verdicts.id, verdicts.sample] = verdicts
            done = len(one.answers.judged)
            on_progress(f"{one.task.name}: {Path(one.model).name}: verdicts", done, len(one.answers.written))
        if judge.cut:
            one.answers.notes.append(f"{judge.cut} of the judge's questions had no room, and lost their beginning")
            judge.cut = 0
    return digests


def _look_for_overlap(asked: Sequence[_Asked], on_progress: OnProgress) -> None:
    """Tell of each run which items stand in the records that it was trained on, where these are at hand."""
    for name in dict.fromkeys(one.model for one in asked):
        if (run := run_of(name)) is None:
            continue
        mine = [one for one in asked if one.model == name]
        looked = [Overlap(one.task.items) for one in mine]
        try:
            for number, record in enumerate(trained_records(load_recipe(run / "recipe.yaml")), start=1):
                for overlap in looked:
                    overlap.read(record.fields)
                if number % 1000 == 0:
                    on_progress(f"{Path(name).name}: training records looked at", number, number)
        except InputError as error:
            for one in mine:
                one.more["overlap"] = None
                one.answers.notes.append(f"its training records are not at hand, so no overlap was looked for: {error}")
            continue
        for one, overlap in zip(mine, looked, strict=True):
            one.more["overlap"] = overlap.document()
            if overlap.found:
                one.answers.notes.append(
                    f"the questions of {len(overlap.found)} of {len(one.task.items)} items stand in the records that "
                    f"{name} was trained on: its figures may be better than it is"
                )
