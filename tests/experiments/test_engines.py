"""Trials on one base model end as runs of their own would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core_training.engine.central import train
from core_training.engine.engine import open_engine
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from experiments.search.engines import Engines
from experiments.search.objectives import parse_objectives
from experiments.search.trial import run_trial

pytestmark = pytest.mark.slow

CHANGES: list[dict[str, Any]] = [
    {},
    {"training": {"learning_rate": 3e-3, "weight_decay": 0.1, "warmup_steps": 2, "max_steps": 4}},
    {"training": {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "optim": "adafactor"}},
    {"training": {"per_device_train_batch_size": 3, "max_grad_norm": 0.1}},
    {"tuning": {"mode": "lora", "lora": {"r": 2, "lora_alpha": 4}}},
    {"training": {"seed": 5, "max_length": 40, "neftune_noise_alpha": 5.0}},
    {"training": {"gradient_checkpointing": True}},
    {"tuning": {"mode": "full"}, "training": {"learning_rate": 1e-3}},
    {"stage": "dpo"},
    {},
]
"""What one trial changes of the recipe; what is loaded stays for some, and not for others."""


def test_a_trial_ends_as_a_run_of_its_own_whatever_came_before_it(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(f'{{"prompt": "q {i}?", "chosen": "a {i}", "rejected": "b {i}"}}\n' for i in range(20)))
    engines, bases = Engines(), []
    for number, changes in enumerate(CHANGES):
        data = {"data": {"train": str(pairs), "columns": {}}} if changes.get("stage") == "dpo" else {}
        recipe = make_recipe(**changes, **data)
        shared = recipe.model_copy(update={"output": str(tmp_path / f"shared-{number}")})
        ended = run_trial(shared, parse_objectives("eval_loss"), engines, None)
        assert ended.state == "complete", ended.why
        bases.append(id(engines._base))
        alone = RunFolder(tmp_path / f"alone-{number}")
        alone.prepare(recipe, resume=False)
        engine = open_engine(recipe)
        summary = train(recipe, engine, alone)
        engine.close()
        told = RunFolder(Path(shared.output)).summary()
        assert told is not None
        assert (told["state_digest"], told["eval_loss"]) == (summary.state_digest, summary.eval_loss), changes
        assert ended.values == [summary.eval_loss]
    assert len(set(bases[:4])) == 1, "the model is loaded once for trials that change only how steps are taken"
    assert bases[4] != bases[3]


def test_a_loss_that_is_no_number_prunes_a_trial_and_the_next_is_not_touched(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    engines = Engines()

    def ended(name: str, rate: float) -> Any:
        recipe = make_recipe(
            output=str(tmp_path / name), tuning={"mode": "full"}, training={"learning_rate": rate, "max_grad_norm": 0.0}
        )
        return run_trial(recipe, parse_objectives("eval_loss"), engines, None)

    first = ended("first", 1e-3)
    wild = ended("wild", 1e30)
    assert (wild.state, wild.why.startswith("diverged: ")) == ("pruned", True)
    assert ended("again", 1e-3).values == first.values
