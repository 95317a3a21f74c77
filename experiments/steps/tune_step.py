"""A step that searches for the values of a recipe's keys, as `fedloom tune` does.

Its `best.yaml` may be a later step's recipe: `recipe: ${NAME}/best.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from core_training import __version__
from core_training.foundation.bounded_reading import ForeignTextError, read_json, shortened
from core_training.foundation.errors import InputError
from experiments.digests import Digester, digest_of
from experiments.documents import beside, check_keys, load_mapping
from experiments.running import OnProgress
from experiments.search.carrying_out import carry_out
from experiments.search.definition import Search, parse_search
from experiments.search.outcome import OUTCOME_FILE
from experiments.steps.step import Step, set_aside

_FIGURES = ("best.value", "trials", "pruned", "failed")


class TuneStep(Step):
    """`tune` (a search's file, or a search). Its figures: the best value, and how many trials there were."""

    KEY, FIGURES = "tune", True

    @property
    def what(self) -> str:
        search = self._search()
        return f"tune · {search.sampler.name} · {search.trials} trials"

    def check(self) -> None:
        self._search()

    def digest(self, digester: Digester) -> str:
        search = self._search()
        confirm = search.confirm and [search.confirm.top, search.confirm.topology, dict(search.confirm.values)]
        asked = [search.identity(), search.trials, confirm]
        return digest_of([self.KEY, __version__, asked, digester.of_recipe(search.base)])

    def run(self, on_progress: OnProgress, *, resume: bool) -> None:
        search = self._search()
        if not resume:
            set_aside(self.folder)
        ended = 0

        @contextmanager
        def watch(label: str) -> Iterator[OnProgress]:
            yield lambda *_: None

        def tell(*_: object) -> None:
            nonlocal ended
            ended += 1
            on_progress(ended, search.trials, "")

        carry_out(search, watch, tell)

    @property
    def is_there(self) -> bool:
        return (self.folder / OUTCOME_FILE).is_file()

    def summary(self) -> dict[str, Any]:
        try:
            document = read_json(self.folder / OUTCOME_FILE)
        except (OSError, ForeignTextError):
            return {}
        return document if isinstance(document, dict) else {}

    def check_figure(self, name: str, place: str) -> None:
        check_keys({name: None}, _FIGURES, f"{place}: ")

    def _search(self) -> Search:
        given = self.settings["tune"]
        if isinstance(given, dict):
            return parse_search(given, f"steps.{self.name}.tune", self.home, self.folder)
        if not isinstance(given, str):
            raise InputError(f"{self.place}tune: name a search's file, or write a search, not {shortened(given)}")
        path = beside(given, self.home)
        return parse_search(load_mapping(path, "search"), f"{self.place}tune: {path}", path.parent, self.folder)
