"""A site's figures for a federated evaluation: its result, and its own model if it has one, judged on its own items."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core_training.foundation.errors import InputError
from core_training.models.results import find_result
from core_training.recipe.schema import Recipe
from core_training.runs.finished_run import Result
from core_training.runs.result_format import result_name
from evaluation.answers.subjects import Subject, result_subject
from evaluation.federated.site_sums import Plan, SiteFigures, figures_of
from evaluation.items import Sampling
from evaluation.running import Settings, evaluate
from evaluation.tasks.loading import HELD_OUT, Wanted, held_out_task, task_of_files

COMMON, OWN = "result", "own"


@dataclass(frozen=True)
class AtSite:
    """What is judged at a site and where it lies.

    `recipe` is the run's, with the site's files and models in the place of names; `run` the run's folder here.
    """

    run: Path
    recipe: Recipe
    data: str
    files: tuple[str, ...]
    """The files of the data set; of `held-out` those that the run read."""


def judged(at: AtSite, plan: Plan, max_tokens: int, seed: bytes, least_items: int, folder: Path) -> SiteFigures:
    """Judge what the run left here; answers are kept in `folder`, and are not asked for again after a kill.

    Raises InputError for items that do not fit the plan, or are fewer than the site's least.
    """
    wanted = Wanted(plan.metrics, columns=dict(at.recipe.data.columns))
    if at.data == HELD_OUT:
        task = held_out_task(at.recipe, "the run", wanted)
    else:
        task = task_of_files(at.data, at.files, wanted)
    if len(task.items) < least_items:
        said = f"evaluation.least_items: this site tells nothing of fewer than {least_items} items"
        raise InputError(said, public=said)
    names = [COMMON, *([OWN] if plan.own and (at.run / OWN).is_dir() else [])]
    settings = Settings(Sampling(max_tokens=max_tokens), max_length=at.recipe.training.max_length, overlap=False)
    found = evaluate(names, [task], settings, folder, load=lambda name: _subject(at, name))
    answers = {result.model: result.answers for result in found.results}
    return figures_of(plan, task.items, answers[COMMON], seed, answers.get(OWN))


def _subject(at: AtSite, name: str) -> Subject:
    folder = at.run / OWN if name == OWN else at.run
    if name == OWN:
        return result_subject(name, Result(at.recipe, find_result(folder).folder))
    if not (folder / result_name(at.recipe)).is_dir():
        said = "this site has no result of the run: it was away when the run ended"
        raise InputError(said, public=said)
    return result_subject(name, Result(at.recipe, folder / result_name(at.recipe)))
