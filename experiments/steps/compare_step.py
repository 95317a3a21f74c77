"""A step that compares models pair by pair, as `fedloom compare` does; its pairs may be a later step's records.

`data: {train: ${NAME}/preferences.jsonl}`. People judge in no pipeline: it would wait for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_training import __version__
from core_training.foundation.bounded_reading import ForeignTextError, read_json, shortened
from core_training.foundation.durable import commit_json
from core_training.foundation.errors import InputError
from experiments.digests import Digester, digest_of, named_here
from experiments.documents import beside, check_keys, whole_at
from experiments.running import OnProgress
from experiments.steps.asked import check_on, digest_of_task, function_files, tasks_of, temperature_at
from experiments.steps.step import Step, set_aside

if TYPE_CHECKING:
    from evaluation.items import Sampling, Task
    from evaluation.pairs.contest import Compared

_RESULTS = "results.json"
_FIRST = ("win_rate", "wins", "losses", "ties", "unjudged", "rating")
_ALL = ("position_bias", "tie_share")
_OF_A_MODEL = ("rating", "low", "high", "wins", "losses", "ties", "unjudged", "win_rate", "answer_tokens")


class CompareStep(Step):
    """`compare` (two models at least) `on` prompts by a `judge`, with the options of the command as keys.

    Figures without a name in front are the first model's: `win_rate` (a tie is half), `rating`, `p` (the largest of its
    pairs', by Holm). `models.NAME.rating` and so on are of the model in the folder of that name.
    """

    KEY, FIGURES = "compare", True
    KEYS = ("on", "judge", "limit", "max_tokens", "temperature", "seed")

    @property
    def what(self) -> str:
        return f"compare · {len(self._models)} models · {Path(self._judge).name}"

    def check(self) -> None:
        if len(self._models) < 2:
            raise InputError(f"{self.place}compare: name two models at least, such as [${{ppo}}, ${{sft}}]")
        if twice := next((name for name in self._models if self._models.count(name) > 1), None):
            raise InputError(f"{self.place}compare: {twice} is named twice; a model is compared with others")
        if not isinstance(self.settings.get("on"), str) or not self.settings["on"]:
            raise InputError(f"{self.place}on: name a file of prompts, not {shortened(self.settings.get('on'))}")
        check_on(self, self.settings["on"])
        self._check_judge()
        for key, default, least in (("limit", 1, 1), ("max_tokens", 256, 1), ("seed", 0, 0)):
            whole_at(self.settings, key, default, self.place, least)
        temperature_at(self.settings, self.place)

    def _check_judge(self) -> None:
        judge = self.settings.get("judge")
        if judge == "people":
            raise InputError(
                f"{self.place}judge: people would keep the pipeline waiting; they judge with `fedloom compare`"
            )
        if not isinstance(judge, str) or ":" not in judge:
            forms = "reward:RUN, model:RUN|MODEL, FILE.py:function or module:function"
            raise InputError(f"{self.place}judge: name {forms}, not {shortened(judge)}")

    def check_figure(self, name: str, place: str) -> None:
        of_models = [f"models.{Path(model).name}.{key}" for model in self._models for key in _OF_A_MODEL]
        check_keys({name: None}, [*_FIRST, "p", *_ALL, *of_models], f"{place}: ")

    def digest(self, digester: Digester) -> str:
        places = [place for name in (*self._models, self._judge) for place in named_here(name)]
        read = [digester.of_place(place) for place in (*places, *function_files(self._judge))]
        return digest_of([self.KEY, __version__, dict(self.settings), read, digest_of_task(self._task(), digester)])

    def run(self, on_progress: OnProgress, *, resume: bool) -> Compared:
        import core_training.foundation.environment  # noqa: F401 - before PyTorch is imported
        from evaluation.pairs.contest import check_judge, load_contest, load_pair_judge, settle
        from evaluation.pairs.pair_judges import judge_name
        from evaluation.running import Settings

        def advance(doing: str, done: int, total: int) -> None:
            on_progress(done, total, doing)

        judge = judge_name(self._judge)
        check_judge(judge)
        if not resume:
            set_aside(self.folder)
        contest = load_contest(self._models, self._task(), judge, Settings(self._sampling()), self.folder, advance)
        contest.judge_all(load_pair_judge(contest), advance)
        found = settle(contest)
        commit_json(self.folder / _RESULTS, found.document)
        return found

    @property
    def is_there(self) -> bool:
        return (self.folder / _RESULTS).is_file()

    def summary(self) -> dict[str, Any]:
        try:
            document = read_json(self.folder / _RESULTS)
        except (OSError, ForeignTextError):
            return {}
        return _figures(document) if isinstance(document, dict) else {}

    @property
    def _models(self) -> list[str]:
        value = self.settings["compare"]
        if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
            raise InputError(f"{self.place}compare: a list of models, such as [${{ppo}}, ${{sft}}]")
        return list(value)

    @property
    def _judge(self) -> str:
        """The judge's name; a function's file is beside the pipeline's."""
        judge = str(self.settings["judge"])
        file, _, function = judge.rpartition(":")
        return f"{beside(file, self.home)}:{function}" if file.endswith(".py") else judge

    def _task(self) -> Task:
        wanted: dict[str, Any] = {"metrics": ("ended", "answer_tokens"), "limit": self.settings.get("limit")}
        return tasks_of([self.settings["on"]], self._models, self.home, **wanted)[0]

    def _sampling(self) -> Sampling:
        from evaluation.items import Sampling

        given = self.settings
        return Sampling(given.get("max_tokens", 256), given.get("temperature", 0.0), 1, given.get("seed", 0))


def _figures(document: Mapping[str, Any]) -> dict[str, Any]:
    models = document["models"]
    first = models[0]
    ps = [one["p_holm"] for one in document["pairs"] if first["model"] in (one["model"], one["against"])]
    return {
        **{key: first[key] for key in _FIRST},
        "p": max((p for p in ps if p is not None), default=None),
        **{key: document[key] for key in _ALL},
        "models": {Path(one["model"]).name: {key: one[key] for key in _OF_A_MODEL} for one in models},
    }
