"""Finished runs of one start put together without training: their changes added up, by rules of PEFT's.

A run's change is its result less what it started from, so the runs must have started from the same: base, adapters'
first values, earlier runs. Each tensor is put together by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_training.foundation.durable import commit_folder, new_folder
from core_training.foundation.errors import InputError
from core_training.foundation.state import TrainableState
from core_training.foundation.strict_json import strict_json
from core_training.models.base_model import BaseModel
from core_training.models.export import layout_files
from core_training.models.loading import restore_buffers
from core_training.models.parameters import read_parameters, write_parameters
from core_training.models.probe import check_written
from core_training.models.results import trained_state
from core_training.recipe.schema import Recipe
from core_training.runs.finished_run import Result, find_result
from core_training.runs.result_format import MODEL_CONFIG, result_name, write_result
from core_training.runs.run_folder import RunFolder, Summary

if TYPE_CHECKING:
    import torch

ACCOUNT = "merge.json"
"""The file of the folder that says what was put together, and how."""


@dataclass(frozen=True)
class Rule:
    """A rule: the function of PEFT's merge utilities, and the share of each change that it keeps unless one is given.

    `adds_up`: it adds the changes up, so that the weights of a mean are shares; else it divides by the runs that have a
    say in a value, and the weights are shares of their number.
    """

    function: str
    density: float | None
    adds_up: bool


RULES: Mapping[str, Rule] = {
    "task_arithmetic": Rule("task_arithmetic", None, adds_up=True),  # Ilharco et al. 2023
    "ties": Rule("ties", 0.2, adds_up=False),  # Yadav et al. 2023, who keep a fifth
    "dare": Rule("dare_linear", 0.5, adds_up=True),  # Yu et al. 2024
    "dare_ties": Rule("dare_ties", 0.5, adds_up=False),
}


@dataclass(frozen=True)
class Merge:
    """How runs are put together: start + `scale` × what the rule makes of their changes.

    `weights` are relative to each other (None: alike), `density` is the share of each change that is kept.
    """

    rule: str = "task_arithmetic"
    weights: Sequence[float] | None = None
    scale: float = 1.0
    density: float | None = None
    seed: int = 0


def merge_runs(runs: Sequence[Path], to: Path, merge: Merge, base: Path | None = None) -> Summary:
    """Write the run folder `to`, which holds what the runs' results come to together; returns its summary.

    Raises InputError where the runs did not start from the same, and for settings that the rule has not.
    """
    to = new_folder(to)
    weights = _checked(merge, len(runs))
    results = [find_result(run, base) for run in runs]
    summaries = [_summary_of(run) for run in runs]
    _require_one_start(runs, results, summaries)
    recipe = results[0].recipe
    model = BaseModel(recipe)
    states = [trained_state(result, model) for result in results]
    state = combined(model.initial_state, states, merge, weights)
    write_parameters(model.trainable_parameters, state)
    restore_buffers(model.model, results[0])
    layout = layout_files(model, recipe, recipe.model.name_or_path)
    summary = Summary(
        topology=recipe.topology.kind,
        stage=recipe.stage,
        tuning=recipe.tuning.mode,
        status="completed",
        trainable_parameters=state.manifest.size,
        initial_digest=summaries[0]["initial_digest"],
        state_digest=state.digest,
    )
    account = {
        **asdict(merge),
        "density": _density(merge),
        "weights": weights,
        "runs": [
            {"folder": str(run), "state_digest": one["state_digest"]} for run, one in zip(runs, summaries, strict=True)
        ],
    }
    with commit_folder(to) as scratch:
        folder = scratch / result_name(recipe)
        write_result(read_parameters(model.result_parameters), layout, folder, model.tokenizer)
        if MODEL_CONFIG in layout:
            check_written(model.model, folder)
        run = RunFolder(scratch)
        run.keep_recipe(recipe.model_copy(update={"output": str(to)}).to_yaml())
        (scratch / ACCOUNT).write_text(strict_json(account, indent=2) + "\n", encoding="utf-8")
        run.write_summary(summary)
    return summary


def combined(
    start: TrainableState, states: Sequence[TrainableState], merge: Merge, weights: Sequence[float]
) -> TrainableState:
    """start + scale × the rule's combination of state − start, tensor by tensor, in float32."""
    import torch
    from peft.utils import merge_utils

    function: Callable[..., torch.Tensor] = getattr(merge_utils, RULES[merge.rule].function)
    density = _density(merge)
    settings: dict[str, Any] = {} if density is None else {"density": density}
    outcome = TrainableState(start.manifest, start.buffer.copy())
    arrays = [dict(state.tensors()) for state in states]
    with torch.random.fork_rng(devices=[]):  # what falls by lot is the same each time
        torch.manual_seed(merge.seed)
        for name, values in outcome.tensors():
            changes = [torch.from_numpy(array[name] - values) for array in arrays]
            change = function(changes, torch.tensor(weights), **settings)
            values += merge.scale * change.numpy().reshape(values.shape)
    return outcome


def _density(merge: Merge) -> float | None:
    return RULES[merge.rule].density if merge.density is None else merge.density


def _checked(merge: Merge, runs: int) -> list[float]:
    """The weights as the rule takes them. Raises InputError for settings that do not fit."""
    rule, given = RULES[merge.rule], merge.weights or [1.0] * runs
    if runs < 2:
        raise InputError("merge: name two runs or more")
    if len(given) != runs:
        raise InputError(f"--weights: {len(given)} numbers for {runs} runs; give one for each")
    if not all(0 < weight < math.inf for weight in given):
        raise InputError("--weights: each has to be a number above 0; leave a run out instead")
    if not math.isfinite(merge.scale):
        raise InputError("--scale: give a number")
    if merge.density is not None and rule.density is None:
        raise InputError(f"--density: rule {merge.rule} keeps all of a change; leave it out")
    if merge.density is not None and not 0 < merge.density <= 1:
        raise InputError(f"--density: {merge.density:g} is no share; give more than 0, at most 1")
    total = sum(given) if rule.adds_up else sum(given) / runs
    return [weight / total for weight in given]


def _summary_of(run: Path) -> dict[str, Any]:
    summary = RunFolder(run).summary()
    if summary is None or summary.get("status") != "completed" or summary.get("state_digest") is None:
        raise InputError(f"{run}: it has not completed with one result; --resume goes on with it")
    return summary


def _require_one_start(runs: Sequence[Path], results: Sequence[Result], summaries: Sequence[Mapping[str, Any]]) -> None:
    first = summaries[0]["initial_digest"]
    for run, result, summary in zip(runs[1:], results[1:], summaries[1:], strict=True):
        if summary["initial_digest"] != first or first is None:
            differing = _what_differs(results[0].recipe, result.recipe)
            raise InputError(
                f"{run} started from something else than {runs[0]}{differing}: only changes of one start can be added; "
                "train them with the same base, tuning and training.seed"
            )


def _what_differs(one: Recipe, other: Recipe) -> str:
    pairs = {
        "model.name_or_path": (one.model.name_or_path, other.model.name_or_path),
        "model.adapters": (one.model.adapters, other.model.adapters),
        "tuning": (one.tuning, other.tuning),
        "training.seed": (one.training.seed, other.training.seed),
        "stage": (one.stage, other.stage),
    }
    keys = [key for key, (ours, theirs) in pairs.items() if ours != theirs]
    return f" ({', '.join(keys)} differ)" if keys else ""
