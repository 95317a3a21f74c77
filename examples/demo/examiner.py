"""The examiner: asks a trained adapter the held-out questions of every hospital, the same for all.

Knows nothing of how an adapter came about; it loads the files that PEFT would load.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core_training.engine.engine import Engine, open_engine
from core_training.foundation.state import TrainableState
from core_training.foundation.trainable import EvalReport, total
from core_training.recipe.schema import Recipe
from core_training.runs.result_format import read_result


@dataclass(frozen=True)
class Marks:
    """What a model, or several on average, reached.

    `eval_loss` is the mean over the answers' tokens; `accuracy` the share of answers that greedy decoding gives word
    for word. `hospitals` has both for each hospital's questions.
    """

    eval_loss: float
    accuracy: float
    hospitals: dict[str, Marks]


class Examiner:
    """One engine, used for evaluation alone."""

    def __init__(self, recipe: Recipe) -> None:
        self._engine: Engine = open_engine(recipe)

    def examine_base(self) -> Marks:
        """The base model before any fine-tuning."""
        return self._examine(self._engine.initial_state)

    def examine(self, adapter: Path) -> Marks:
        """The base model with the adapter in this folder."""
        return self._examine(read_result(adapter, self._engine.manifest))

    def close(self) -> None:
        self._engine.close()

    def _examine(self, state: TrainableState) -> Marks:
        self._engine.write_state(state)
        reports = self._engine.evaluate()
        return _marks(total(reports), {name: _marks(report, {}) for name, report in reports.items()})


def average(marks: list[Marks]) -> Marks:
    """The mean of several models' marks, overall and hospital by hospital."""
    return Marks(
        eval_loss=sum(one.eval_loss for one in marks) / len(marks),
        accuracy=sum(one.accuracy for one in marks) / len(marks),
        hospitals={name: average([one.hospitals[name] for one in marks]) for name in marks[0].hospitals},
    )


def _marks(report: EvalReport, hospitals: dict[str, Marks]) -> Marks:
    assert report.loss is not None
    return Marks(report.loss, report.metrics["exact_match"], hospitals)
