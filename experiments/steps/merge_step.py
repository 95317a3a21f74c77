"""A step that puts earlier runs of one start together without training, as `fedloom merge` does."""

from __future__ import annotations

from pathlib import Path

from core_training import __version__
from core_training.foundation.bounded_reading import shortened
from core_training.foundation.errors import InputError
from core_training.runs.run_folder import RunFolder
from experiments.digests import Digester, digest_of
from experiments.documents import check_keys
from experiments.running import OnProgress
from experiments.steps.step import Step, set_aside

_RULES = ("task_arithmetic", "ties", "dare", "dare_ties")


class MergeStep(Step):
    """`merge` (run folders), with the options of the command as keys."""

    KEY, KEYS = "merge", ("rule", "weights", "scale", "density", "seed")

    @property
    def what(self) -> str:
        return f"merge · {self.settings.get('rule', _RULES[0])}"

    def check(self) -> None:
        runs = self.settings["merge"]
        if not isinstance(runs, list) or not all(isinstance(run, str) and run for run in runs):
            raise InputError(
                f"{self.place}merge: a list of run folders, such as [${{a}}, ${{b}}], not {shortened(runs)}"
            )
        check_keys({str(self.settings.get("rule", _RULES[0])): None}, _RULES, f"{self.place}rule: ")
        weights = self.settings.get("weights") or []
        numbers = [*(weights if isinstance(weights, list) else [weights])]
        numbers += [self.settings[key] for key in ("scale", "density", "seed") if self.settings.get(key) is not None]
        for number in numbers:
            if not isinstance(number, int | float) or isinstance(number, bool):
                raise InputError(
                    f"{self.place}weights, scale, density, seed: these are numbers, not {shortened(number)}"
                )

    def digest(self, digester: Digester) -> str:
        runs = [digester.of_place(Path(run)) for run in self.settings["merge"]]
        return digest_of([self.KEY, __version__, {**self.settings, "merge": runs}])

    def run(self, on_progress: OnProgress, *, resume: bool) -> None:
        import core_training.foundation.environment  # noqa: F401 - before PyTorch is imported
        from core_training.models.combination import Merge, merge_runs

        given = self.settings
        settings = Merge(
            given.get("rule", _RULES[0]),
            given.get("weights"),
            float(given.get("scale", 1.0)),
            given.get("density"),
            int(given.get("seed", 0)),
        )
        set_aside(self.folder)
        merge_runs([Path(run) for run in given["merge"]], self.folder, settings)

    @property
    def is_there(self) -> bool:
        return RunFolder(self.folder).has_completed
