"""Flower's Ray engine against the engine in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from core_training.recipe import Recipe
from core_training.run_folder import RunFolder
from simulations import simulate


@pytest.mark.slow
def test_ray_gives_the_digest_of_the_run_in_one_process(
    make_recipe: Callable[..., Recipe], site_files: list[Path], tmp_path: Path
) -> None:
    digests = {}
    for engine in ("inprocess", "ray"):
        recipe = make_recipe(
            tuning={"lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}},
            topology={"kind": "federated", "rounds": 2, "local_steps": 2},
            simulation={"sites": [str(path) for path in site_files], "engine": engine},
        )
        summary = simulate(recipe, RunFolder(tmp_path / engine), False, lambda *_: None)
        assert summary.status == "completed"
        assert len(summary.sites) == len(site_files)
        digests[engine] = summary.state_digest
    assert digests["ray"] == digests["inprocess"]
