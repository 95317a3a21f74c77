"""What a training process does not load on the way to its first step: each of these takes longer than the step."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core_training.recipe.schema import Recipe

NEEDLESS = (
    "datasets",
    "pandas",
    "pyarrow",
    "sklearn",
    "trl",
    "deepspeed",
    "ray",
    "flwr",
    "transformers.trainer",
    "bitsandbytes",
)
PROGRAM = """
import gc, sys
from core_training.models.libraries import own_the_process
own_the_process()
from core_training.distributed.launch import opened_engine
from core_training.recipe.reading import load_recipe
from pathlib import Path
with opened_engine(load_recipe(Path(sys.argv[1]))) as engine:
    engine.train(1)
print([name for name in sys.argv[2:] if name in sys.modules], gc.isenabled())
"""


@pytest.mark.slow
def test_a_first_step_needs_no_library_of_tables_or_trainers(
    make_recipe: Callable[..., Recipe], tmp_path: Path, environment: dict[str, str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe(training={"max_steps": 1}).to_yaml())
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(recipe), *NEEDLESS],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout.strip() == "[] True"
