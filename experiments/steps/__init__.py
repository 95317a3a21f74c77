"""The kinds of steps that a pipeline may have. A new kind is one file here and its line in the table."""

from __future__ import annotations

from experiments.steps.compare_step import CompareStep
from experiments.steps.evaluate_step import EvaluateStep
from experiments.steps.export_step import ExportStep
from experiments.steps.merge_step import MergeStep
from experiments.steps.recipe_step import RecipeStep
from experiments.steps.step import Step
from experiments.steps.tune_step import TuneStep

STEP_KINDS: dict[str, type[Step]] = {
    kind.KEY: kind for kind in (RecipeStep, TuneStep, EvaluateStep, CompareStep, ExportStep, MergeStep)
}
"""By the key that a step of the kind has."""
