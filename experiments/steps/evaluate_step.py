"""A step that evaluates runs or models on files of questions and records, as `fedloom evaluate` does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_training import __version__
from core_training.foundation.bounded_reading import ForeignTextError, read_json, shortened
from core_training.foundation.durable import commit_file
from core_training.foundation.errors import InputError
from core_training.foundation.strict_json import strict_json
from experiments.digests import Digester, digest_of, named_here
from experiments.documents import check_keys, whole_at
from experiments.running import OnProgress
from experiments.steps.asked import HELD_OUT, check_on, digest_of_task, tasks_of
from experiments.steps.step import Step

if TYPE_CHECKING:
    from evaluation.items import Task
    from evaluation.running import Evaluation

_RESULTS = "results.json"


class EvaluateStep(Step):
    """`evaluate` (a run or model, or several) `on` files or tasks, with the options of the command as keys.

    Its figures are the first model's: `METRIC`, or `TASK.METRIC` where it answers several tasks.
    """

    KEY, FIGURES = "evaluate", True
    KEYS = ("on", "against", "metrics", "limit", "max_tokens", "reward")

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
        if "reward" in self.settings:
            self.text_at("reward")

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
        asked = [digest_of_task(task, digester) for task in self._tasks()]
        places = [*self._models, *self._listed("metrics"), *self._listed("reward")]
        files = [digester.of_place(place) for name in places for place in named_here(name)]
        settings = {key: value for key, value in self.settings.items() if key not in ("evaluate", "against", "reward")}
        return digest_of([self.KEY, __version__, settings, self._models, asked, files])

    def run(self, on_progress: OnProgress, *, resume: bool) -> Evaluation:
        import core_training.foundation.environment  # noqa: F401 - before PyTorch is imported
        from evaluation.items import Sampling
        from evaluation.running import Settings, evaluate

        reward = self._listed("reward")
        sampling = Sampling(max_tokens=self.settings.get("max_tokens", 256))
        settings = Settings(sampling, reward=Path(reward[0]) if reward else None)
        self.folder.mkdir(parents=True, exist_ok=True)
        found = evaluate(
            self._listed("evaluate"),
            self._tasks(),
            settings,
            self.folder,
            lambda doing, done, total: on_progress(done, total, doing),
            self._listed("against"),
        )
        commit_file(self.folder / _RESULTS, (strict_json(found.document(), indent=2) + "\n").encode())
        return found

    @property
    def is_there(self) -> bool:
        return (self.folder / _RESULTS).is_file()

    def summary(self) -> dict[str, Any]:
        try:
            results = read_json(self.folder / _RESULTS)["results"]
        except (OSError, ForeignTextError, KeyError, TypeError):
            return {}
        own = [one for one in results if one["model"] == results[0]["model"]]
        values = {one["task"]: {name: value["value"] for name, value in one["metrics"].items()} for one in own}
        return next(iter(values.values())) if len(values) == 1 else values

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
