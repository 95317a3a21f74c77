"""A step that writes an earlier run's result for other tools, as `fedloom export` does."""

from __future__ import annotations

from pathlib import Path

from core_training import __version__
from core_training.foundation.bounded_reading import shortened
from core_training.foundation.errors import InputError
from experiments.digests import Digester, digest_of
from experiments.running import OnProgress
from experiments.steps.step import Step, set_aside


class ExportStep(Step):
    """`export` (a run folder): its adapter, or with `merge: true` a whole model."""

    KEY, KEYS = "export", ("merge",)

    @property
    def what(self) -> str:
        return f"export · {'model' if self.settings.get('merge') else 'adapter'}"

    def check(self) -> None:
        self.text_at("export")
        if not isinstance(self.settings.get("merge", False), bool):
            raise InputError(f"{self.place}merge: true or false, not {shortened(self.settings['merge'])}")

    def digest(self, digester: Digester) -> str:
        merges = self.settings.get("merge", False)
        return digest_of([self.KEY, __version__, merges, digester.of_place(Path(self.text_at("export")))])

    def run(self, on_progress: OnProgress, *, resume: bool) -> None:
        import core_training.foundation.environment  # noqa: F401 - before PyTorch is imported
        from core_training.models.results import export_adapter, export_model, find_result

        result = find_result(Path(self.text_at("export")))
        set_aside(self.folder)
        if result.is_adapter and not self.settings.get("merge"):
            export_adapter(result, self.folder)
        else:
            export_model(result, self.folder)
