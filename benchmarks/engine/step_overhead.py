"""What a step of the engine costs outside forward, backward and optimizer, and what one more paused engine costs.

Each of the three is timed where the loop calls it; what is left of a slice's time is the overhead: reading rows,
collating them, counting units, clipping, looking whether the loss is a number, random states, the schedule, the report.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from benchmarks.figure import Figure
from benchmarks.fresh_process import in_fresh_process
from benchmarks.places import Places
from core_training.recipe.reading import parse_recipe

MOST_OVERHEAD = 1.0
MOST_MILLISECONDS = 10.0
SLICES = 6
STEPS = 12
ENGINES = 100


def measure(places: Places) -> Iterator[Figure]:
    total = SLICES * STEPS
    recipe = places.recipe("topology.kind=central", f"training.max_steps={total}", f"training.save_steps={total}")
    details = in_fresh_process(profile, recipe_text=recipe.to_yaml()).result
    yield Figure(
        name="step_overhead",
        meaning="a step's time outside forward, backward and optimizer",
        value=details["overhead_percent"],
        unit="%",
        target=MOST_OVERHEAD,
        details=details,
    )
    milliseconds = in_fresh_process(prepare_many, recipe_text=recipe.to_yaml()).result
    yield Figure(
        name="one_more_engine",
        meaning="preparing one more paused engine on a base that is there",
        value=statistics.median(milliseconds),
        unit="ms",
        target=MOST_MILLISECONDS,
        details={"engines": ENGINES, "slowest": max(milliseconds[1:])},
    )


def profile(recipe_text: str) -> dict[str, Any]:
    """Train; returns the share of the time that is none of the three, and the milliseconds of a step's parts."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from core_training.engine.engine import open_engine
    from core_training.engine.random_state import RandomState
    from core_training.engine.step_loop import StepLoop
    from core_training.stages.language import LanguageStage

    engine = open_engine(parse_recipe(recipe_text))
    engine.launch()
    seconds: Counter[str] = Counter()
    timed = (
        (LanguageStage, "loss", "forward"),
        (Accelerator, "backward", "backward"),
        (AcceleratedOptimizer, "step", "optimizer"),
        (StepLoop, "_next_batches", "of the rest: data"),
        (StepLoop, "_clip_gradient", "of the rest: clipping"),
        (StepLoop, "_check_loss", "of the rest: finite loss"),
        (StepLoop, "_forget_gradients", "of the rest: forgetting gradients"),
        (RandomState, "present", "of the rest: random states"),
    )
    shares = []
    with ExitStack() as stack:
        for owner, name, label in timed:
            stack.enter_context(_timed(owner, name, label, seconds))
        for number in range(SLICES):
            seconds.clear()
            report = engine.train(STEPS)
            if number > 0:
                three = sum(seconds[name] for name in ("forward", "backward", "optimizer"))
                shares.append(100 * (1 - three / report.seconds))
    parts = {name: 1000 * value / STEPS for name, value in sorted(seconds.items())}
    return {"overhead_percent": statistics.median(shares), "milliseconds_of_a_step": parts, "slices": shares}


def prepare_many(recipe_text: str) -> list[float]:
    """Milliseconds to prepare each of many engines on one base."""
    from core_training.engine.dataset import load_dataset
    from core_training.engine.engine import Engine
    from core_training.models.base_model import BaseModel
    from core_training.stages.base import load_stage

    recipe = parse_recipe(recipe_text)
    stage = load_stage(recipe, BaseModel(recipe))
    dataset = load_dataset(recipe, stage)
    engines, milliseconds = [], []
    for _ in range(ENGINES):
        engine = Engine(stage, dataset)
        began = time.perf_counter()
        engine.launch()
        milliseconds.append(1000 * (time.perf_counter() - began))
        engines.append(engine)
    return milliseconds


@contextmanager
def _timed(owner: Any, name: str, label: str, seconds: Counter[str]) -> Iterator[None]:
    inner: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return inner(*arguments, **named)
        finally:
            seconds[label] += time.perf_counter() - began

    with patch.object(owner, name, call):
        yield
