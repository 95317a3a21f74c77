"""What `fedloom evaluate` has Evidently and promptfoo do with the answers that it kept: asked before, told after."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_training.foundation.durable import new_folder
from core_training.foundation.errors import InputError

if TYPE_CHECKING:
    from evaluation.bridges.evidently_results import EvidentlyResults
    from evaluation.bridges.promptfoo_results import PromptfooResults
    from evaluation.bridges.promptfoo_suite import Check
    from evaluation.items import Task

Say = Callable[[str], None]

EVIDENTLY = "--evidently"
PROMPTFOO = "--promptfoo"
_CHECK_OF = {"exact_match": "exact_match", "rouge_l": "rouge_1", "accuracy": "exact_match"}
"""promptfoo's checks that stand for metrics of ours."""
_USUAL_CHECK = "contains"


@dataclass(frozen=True)
class Loaded:
    """What loading and asking models takes: the options of `evaluate` of those names."""

    base: Path | None
    site: str | None
    max_tokens: int


@dataclass(frozen=True)
class Asked:
    """What was asked of the two: folders of reports, tests and checks in words, environments."""

    evidently: Path | None = None
    tests: tuple[str, ...] = ()
    evidently_environment: Path | None = None
    promptfoo: Path | None = None
    checks: tuple[str, ...] = ()
    promptfoo_environment: Path | None = None
    loaded: Loaded | None = None
    """How promptfoo's provider loads the models to ask them; None: it gives the answers that were kept."""

    def ready(self, models: Sequence[str], others: Sequence[str], tasks: Sequence[Task], say: Say) -> Asked:
        """The same with environments that are there, which are made where they were not.

        Raises InputError for all that can be known to be wrong before models are asked, and RunError where making one
        fails.
        """
        if self.tests and self.evidently is None:
            raise InputError(f"--evidently-test: name the report's folder with {EVIDENTLY} DIR")
        if self.promptfoo is None and (self.checks or self.loaded):
            option = "--promptfoo-check" if self.checks else "--promptfoo-asks"
            raise InputError(f"{option}: name the suite's folder with {PROMPTFOO} DIR")
        for option, folder in ((EVIDENTLY, self.evidently), (PROMPTFOO, self.promptfoo)):
            if folder is not None:
                new_folder(folder, option)
                _check_tasks(option, tasks)
        return self._evidently_ready(others, say)._promptfoo_ready([*models, *others], tasks, say)

    def _evidently_ready(self, others: Sequence[str], say: Say) -> Asked:
        if self.evidently is None:
            return self
        from evaluation.bridges.evidently import ENVIRONMENT, check_tests
        from evaluation.bridges.named_tests import parse_test

        check_tests([parse_test(text) for text in self.tests], has_reference=bool(others))
        return replace(self, evidently_environment=ENVIRONMENT.ready(self.evidently_environment, say))

    def _promptfoo_ready(self, names: Sequence[str], tasks: Sequence[Task], say: Say) -> Asked:
        if self.promptfoo is None:
            return self
        from evaluation.bridges.promptfoo import ENVIRONMENT

        if twice := next((name for name in names if list(names).count(name) > 1), None):
            raise InputError(f"{PROMPTFOO}: {twice} is named twice")
        for task in tasks:
            self._checks_of(task)
        return replace(self, promptfoo_environment=ENVIRONMENT.ready(self.promptfoo_environment, say))

    def _checks_of(self, task: Task) -> list[Check]:
        """The checks that were named, or those that stand for the task's metrics."""
        from evaluation.bridges.promptfoo_suite import parse_check

        texts = self.checks or tuple(
            _CHECK_OF.get(name, name)
            for name in task.metrics
            if name in _CHECK_OF or name.startswith("regex:") or ".py:" in name
        )
        return [parse_check(text) for text in dict.fromkeys(texts or (_USUAL_CHECK,))]


@dataclass
class Bridged:
    """What both said, for people and for JSON; `failed` are Evidently's named tests that did."""

    document: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def bridged(
    asked: Asked, models: Sequence[str], others: Sequence[str], tasks: Sequence[Task], folder: Path
) -> Iterator[Bridged]:
    """Have both do what was asked with the answers in a folder; what each said, one after the other.

    Raises InputError and RunError as they do.
    """
    if asked.evidently is not None:
        for model in models:
            for task in tasks:
                place = _place(asked.evidently, [model, task.name], several=len(models) * len(tasks) > 1)
                yield _from_evidently(asked, model, others[0] if others else None, task, folder, place)
    if asked.promptfoo is not None:
        for task in tasks:
            place = _place(asked.promptfoo, [task.name], several=len(tasks) > 1)
            yield _from_promptfoo(asked, [*models, *others], task, folder, place)


def _from_evidently(asked: Asked, model: str, other: str | None, task: Task, folder: Path, place: Path) -> Bridged:
    from evaluation.bridges.answer_rows import read_answers
    from evaluation.bridges.evidently import write_report
    from evaluation.bridges.named_tests import parse_test

    results = write_report(
        place,
        read_answers(folder, model, task.name),
        None if other is None else read_answers(folder, other, task.name),
        [parse_test(text) for text in asked.tests],
        [name.removeprefix("regex:") for name in task.metrics if name.startswith("regex:")],
        asked.evidently_environment,
    )
    named = {"model": model, "task": task.name, "folder": str(place)}
    return Bridged(
        {"evidently": [named | results.document()]},
        list(_said_of(model, task, results, place)),
        [f"{model}: {task.name}: {one.test.name}: {one.said}" for one in results.tests if not one.passed],
    )


def _said_of(model: str, task: Task, results: EvidentlyResults, place: Path) -> Iterator[str]:
    yield f"{task.name}: {model}: Evidently's report is {place / 'report.html'}"
    for one in results.tests:
        yield f"{'passed' if one.passed else 'FAILED'}: {model}: {one.test.name}: {one.said}"
    yield from (f"{task.name}: {model}: {note}" for note in results.notes)
    if not results.offline:
        yield "Evidently ran beside the network: this machine makes no namespace without one"


def _from_promptfoo(asked: Asked, names: Sequence[str], task: Task, folder: Path, place: Path) -> Bridged:
    from evaluation.bridges.answer_rows import read_answers
    from evaluation.bridges.promptfoo import write_report
    from evaluation.bridges.promptfoo_suite import Contestant

    kept = {name: read_answers(folder, name, task.name) for name in names}
    contestants = [Contestant(name, rows) for name, rows in kept.items()]
    if (how := asked.loaded) is not None:
        contestants = [Contestant(name, (), True, how.max_tokens, how.base, how.site) for name in names]
    results = write_report(place, contestants, kept[names[0]], asked._checks_of(task), asked.promptfoo_environment)
    named = {"task": task.name, "folder": str(place)}
    return Bridged({"promptfoo": [named | results.document()]}, list(_told_by(task, results, place)))


def _told_by(task: Task, results: PromptfooResults, place: Path) -> Iterator[str]:
    yield f"{task.name}: promptfoo's suite is {place}"
    for name, one in sorted(results.contestants.items()):
        shares = ", ".join(f"{check} {counts.passed} of {counts.n}" for check, counts in one.checks.items())
        whole = one.passed + one.failed + one.errors
        yield f"{task.name}: {name}: promptfoo passes {one.passed} of {whole} cases ({shares})"
        if one.first_error:
            yield f"{task.name}: {name}: {one.errors} cases could not be carried out: {one.first_error}"
    for reason, count in results.left_out.items():
        yield f"{task.name}: {count} items are not among promptfoo's: {reason}"
    if not results.offline:
        yield "promptfoo ran beside the network: this machine makes no namespace without one"


def _check_tasks(option: str, tasks: Sequence[Task]) -> None:
    from evaluation.figures.metrics import Part, metric

    for task in tasks:
        if not {metric(name).part for name in task.metrics} - {Part.LOSS}:
            raise InputError(f"{option}: {task.name} gives no answers in words; ask for one of them with --metrics")


def _place(folder: Path, names: Sequence[str], *, several: bool) -> Path:
    """The folder itself, or one in it for each of several reports."""
    return folder / "-".join(re.sub(r"[^\w.-]+", "_", name.strip("/")) for name in names) if several else folder
