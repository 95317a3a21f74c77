"""A step that evaluates runs or models on files of questions and records, as `fedloom evaluate` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from core_training import __version__
from core_training.foundation.bounded_reading import ForeignTextError, read_json, shortened
from core_training.foundation.durable import commit_file, commit_json
from core_training.foundation.errors import InputError
from core_training.foundation.hub_models import find_model
from experiments.digests import Digester, digest_of, named_here
from experiments.documents import beside, check_keys, whole_at
from experiments.running import OnProgress
from experiments.steps.asked import HELD_OUT, check_on, digest_of_task, tasks_of, temperature_at
from experiments.steps.step import Judgement, Step

if TYPE_CHECKING:
    from evaluation.figures.gates import Gates, Verdict
    from evaluation.items import Task
    from evaluation.running import Evaluation

T = TypeVar("T")
_RESULTS, _JUNIT = "results.json", "junit.xml"


@dataclass(frozen=True)
class Evaluated:
    """What came of a step, and of the gates of its file."""

    evaluation: Evaluation
    verdicts: list[Verdict]


class EvaluateStep(Step):
    """`evaluate` (a run or model, or several) `on` files or tasks, with the options of the command as keys.

    Its figures are the first model's: `METRIC`, or `TASK.METRIC` where it answers several tasks. `gates_file` names
    gates as `--gates` does, for each model under `evaluate`; what became of them is in junit.xml, too.
    """

    KEY, FIGURES = "evaluate", True
    KEYS = (
        *("on", "against", "metrics", "limit", "max_tokens", "temperature"),
        *("by", "suppress_below", "reward", "judge", "gates_file"),
    )

    @property
    def what(self) -> str:
        return f"evaluate · {', '.join(Path(one).stem for one in self._listed('on'))}"

    def check(self) -> None:
        from evaluation.figures.metrics import metric

        for key in ("evaluate", "on"):
            if not self._listed(key):
                raise InputError(f"{self.place}{key}: name at least one")
        for name in self._listed("metrics"):
            metric(name)
        whole_at(self.settings, "limit", 1, self.place)
        whole_at(self.settings, "max_tokens", 256, self.place)
        for on in self._listed("on"):
            check_on(self, on)
        whole_at(self.settings, "suppress_below", 0, self.place, 0)
        temperature_at(self.settings, self.place)
        for key in ("reward", "judge", "gates_file"):
            if key in self.settings:
                self.text_at(key)
        self._check_groups()

    def _check_groups(self) -> None:
        """Look at gates and columns as far as the tasks are known. Raises InputError."""
        from evaluation.figures.results import check_columns

        by, gates = self._listed("by"), self._gates()
        if gates is not None and gates.need_base and not self._listed("against"):
            raise InputError(f"{self.place}gates_file: a gate is held against base; name that model under against")
        if (by or gates is not None) and not any(self._waits(one) for one in self._listed("on")):
            tasks = self._tasks()
            if gates is not None:
                self._named("gates_file", lambda: gates.check(tasks))
            check_columns(tasks, [*by, *(gates.columns if gates is not None else [])], f"{self.place}by: ")

    def check_figure(self, name: str, place: str) -> None:
        if self._figures is not None:
            check_keys({name: None}, self._figures, f"{place}: ")
            return
        from evaluation.figures.metrics import metric

        try:
            metric(name if len(self._listed("on")) == 1 else name.partition(".")[2])
        except InputError as error:
            raise InputError(f"{place}: {str(error).removeprefix('metrics: ')}") from None

    @cached_property
    def _figures(self) -> list[str] | None:
        """The names of the figures that there will be; None where earlier steps have yet to say what is measured."""
        from evaluation.figures.metrics import REWARD

        on, metrics = self._listed("on"), self._listed("metrics")
        if len(on) == 1 and metrics:
            return [*metrics, *[REWARD] * ("reward" in self.settings)]
        if any(self._waits(one) for one in on):
            return None
        tasks = self._tasks()
        if len(tasks) == 1:
            return list(tasks[0].metrics)
        return [f"{task.name}.{name}" for task in tasks for name in task.metrics]

    def _waits(self, on: str) -> bool:
        """Whether an earlier step has yet to say what `on` is: a run names the columns of a file and its records."""
        if self.comes_of_a_step(on):
            return True
        if on.endswith((".yaml", ".yml")):
            return False
        return on == HELD_OUT or any(self.comes_of_a_step(model) for model in self._models)

    def digest(self, digester: Digester) -> str:
        asked = [digest_of_task(task, digester) for task in self._tasks()] + self._judged_by(digester)
        places = [*self._models, *self._listed("metrics"), *self._listed("reward")]
        files = [digester.of_place(place) for name in places for place in named_here(name)]
        settings = {key: value for key, value in self.settings.items() if key not in ("evaluate", "against", "reward")}
        return digest_of([self.KEY, __version__, settings, self._models, asked, files])

    def _judged_by(self, digester: Digester) -> list[Any]:
        """The digests of the judge and of the file of gates."""
        places = [find_model(name) for name in self._listed("judge")]
        places += [beside(name, self.home) for name in self._listed("gates_file")]
        return [digester.of_place(place) for place in places if place is not None]

    def run(self, on_progress: OnProgress, *, resume: bool) -> Evaluated:
        import core_training.foundation.environment  # noqa: F401 - before PyTorch is imported
        from evaluation.figures.gates import junit, tried
        from evaluation.figures.results import Grouping, check_columns
        from evaluation.items import Sampling
        from evaluation.running import Settings, evaluate

        reward, models, against = self._listed("reward"), self._listed("evaluate"), self._listed("against")
        tasks, gates = self._tasks(), self._gates()
        by = [*self._listed("by"), *(gates.columns if gates is not None else [])]
        check_columns(tasks, by, f"{self.place}by: ")
        settings = Settings(
            Sampling(self.settings.get("max_tokens", 256), temperature_at(self.settings, self.place)),
            Grouping(tuple(by), self.settings.get("suppress_below", 0)),
            reward=Path(reward[0]) if reward else None,
            judge=self.settings.get("judge"),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        found = evaluate(
            models,
            tasks,
            settings,
            self.folder,
            lambda doing, done, total: on_progress(done, total, doing),
            against,
        )
        verdicts: list[Verdict] = []
        document = found.document()
        (self.folder / _JUNIT).unlink(missing_ok=True)
        if gates is not None:
            verdicts = self._named("gates_file", lambda: tried(gates, found.results, models, [*against, None][0]))
            document["gates"] = [one.document() for one in verdicts]
            commit_file(self.folder / _JUNIT, junit(verdicts))
        commit_json(self.folder / _RESULTS, document)
        return Evaluated(found, verdicts)

    @property
    def is_there(self) -> bool:
        return (self.folder / _RESULTS).is_file()

    def summary(self) -> dict[str, Any]:
        results = self._left("results")
        if not results:
            return {}
        own = [one for one in results if one["model"] == results[0]["model"]]
        values = {one["task"]: {name: value["value"] for name, value in one["metrics"].items()} for one in own}
        return next(iter(values.values())) if len(values) == 1 else values

    def judgements(self) -> list[Judgement]:
        return [
            Judgement(one["gate"], f"{Path(one['model']).name}: {one['says']}", one["passed"])
            for one in self._left("gates")
        ]

    def _left(self, key: str) -> list[Any]:
        """What its results have under a key; nothing where there are none."""
        try:
            return list(read_json(self.folder / _RESULTS)[key])
        except (OSError, ForeignTextError, KeyError, TypeError):
            return []

    def _gates(self) -> Gates | None:
        """The gates of the file; None where none is named, or an earlier step has yet to write it."""
        from evaluation.figures.gates import read_gates

        if "gates_file" not in self.settings:
            return None
        name = self.text_at("gates_file")
        path = beside(name, self.home)
        if not path.is_file():
            if self.comes_of_a_step(name):
                return None
            raise InputError(f"{self.place}gates_file: {name}: no such file beside the pipeline's, nor in {Path.cwd()}")
        return self._named("gates_file", lambda: read_gates(path))

    def _named(self, key: str, do: Callable[[], T]) -> T:
        """What comes of it; errors name the step's key in the place of the command's option."""
        try:
            return do()
        except InputError as error:
            raise InputError(f"{self.place}{key}: {str(error).removeprefix('--gates: ')}") from None

    @property
    def _models(self) -> list[str]:
        return [*self._listed("evaluate"), *self._listed("against")]

    def _tasks(self) -> list[Task]:
        metrics, limit = tuple(self._listed("metrics")), self.settings.get("limit")
        wanted: dict[str, Any] = {"metrics": metrics, "limit": limit, "reward": "reward" in self.settings}
        return tasks_of(self._listed("on"), self._models, self.home, **wanted)

    def _listed(self, key: str) -> list[str]:
        """The texts under a key, which may be one or a list. Raises InputError for anything else."""
        value = self.settings.get(key, [])
        listed: Sequence[Any] = value if isinstance(value, list) else [value]
        if not all(isinstance(one, str) and one for one in listed):
            raise InputError(f"{self.place}{key}: a name, or a list of names, not {shortened(value)}")
        return list(listed)
