"""What a run will take on this machine: a few of its steps, tried out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from core_training.data.leaks import Leaks
from core_training.engine.dataset import load_dataset
from core_training.engine.engine import Engine
from core_training.engine.failures import explained
from core_training.models.base_model import BaseModel
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import peak_rss_bytes
from core_training.stages.base import load_stage
from simulations.sites import simulated_sites

_WARM_UP = 1
_STEPS = 3


@dataclass(frozen=True)
class Measured:
    """Seconds and bytes of the steps that were tried, and what they make of the whole run."""

    seconds_per_step: float
    tokens_per_second: float
    steps: int
    sites: int
    peak_bytes: int
    train_examples: int
    eval_examples: int
    leak: str

    @property
    def seconds(self) -> float:
        """All steps of all sites one after the other, without evaluations and exchanges."""
        return self.seconds_per_step * self.steps * self.sites

    def line(self) -> str:
        """The figures for a person."""
        each = f" at each of {self.sites} sites" if self.sites > 1 else ""
        where = "GPU memory" if torch.cuda.is_available() else "memory"
        return (
            f"{self.seconds_per_step:.2g} s a step ({self.tokens_per_second:.0f} tokens/s); {self.steps} steps{each} "
            f"in about {_duration(self.seconds)}, evaluations not counted; {self.peak_bytes / 2**30:.2g} GiB of {where}"
        )


def measured(recipe: Recipe) -> Measured:
    """Load model and data as the run would, and train a few steps. Nothing is written."""
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache": None})})
    untimed = _untimed(recipe)
    with explained("loading the model and its data", recipe):
        stage = load_stage(untimed, BaseModel(untimed))
        data = load_dataset(recipe, stage)
    leaks = Leaks()
    for rows, held_out in [(data.rows, False), *((rows, True) for rows in data.evaluation.values())]:
        for row in rows:
            for example in row:
                leaks.add(example, held_out=held_out)
    engine = Engine(stage, data)
    try:
        if engine.total_steps > _WARM_UP:
            engine.train(_WARM_UP)
        report = engine.train(min(_STEPS, engine.total_steps - engine.step))
        per_step = report.seconds / report.steps
        return Measured(
            seconds_per_step=per_step,
            tokens_per_second=report.tokens / report.seconds,
            steps=engine.total_steps if untimed is recipe else _steps_in_time(recipe, per_step),
            sites=_sites(recipe),
            peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss_bytes(),
            train_examples=data.report.train_examples,
            eval_examples=data.report.eval_examples,
            leak=leaks.warning(),
        )
    finally:
        engine.close()


def _untimed(recipe: Recipe) -> Recipe:
    """The recipe with rounds that no time ends: a few steps are to be tried, however long they take."""
    topology = recipe.topology
    if topology.local_seconds is None or topology.kind == "central":
        return recipe
    update = {"local_seconds": None, "local_steps": topology.most_local_steps}
    return recipe.model_copy(update={"topology": topology.model_copy(update=update)})


def _steps_in_time(recipe: Recipe, per_step: float) -> int:
    """The steps that rounds of `local_seconds` have time for: the one that is begun is ended."""
    return (recipe.topology.rounds or 1) * math.ceil((recipe.topology.local_seconds or 0.0) / per_step)


def _sites(recipe: Recipe) -> int:
    """The sites that a simulation trains on this machine, each by as many steps: by passes, all records' are tried."""
    if recipe.topology.kind == "central" or recipe.topology.local_epochs is not None:
        return 1
    simulation = recipe.simulation
    if simulation.sites is None and simulation.partition is None:
        return 1
    return simulation.count or len(simulated_sites(recipe))


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
