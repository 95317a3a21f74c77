"""Flower's Ray engine against the engine in one process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core_training.recipe.schema import Recipe


@pytest.mark.slow
def test_ray_gives_the_digest_of_the_run_in_one_process(
    make_recipe: Callable[..., Recipe], site_files: list[Path], tmp_path: Path
) -> None:
    """Each in a process of its own: Ray forks, which a process that has had gRPC threads does not always survive.

    Masked, so that a site finds in one actor what it noted in another: its masks as well as its training.
    """
    digests = {}
    for engine in ("inprocess", "ray"):
        recipe = make_recipe(
            tuning={"lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}},
            topology={"kind": "federated", "rounds": 2, "local_steps": 2},
            privacy={"secure_aggregation": True},
            simulation={"sites": [str(path) for path in site_files], "engine": engine},
            output=str(tmp_path / engine),
        )
        (tmp_path / f"{engine}.yaml").write_text(recipe.to_yaml())
        command = [sys.executable, "-m", "fedloom.cli", "simulate", str(tmp_path / f"{engine}.yaml"), "--json"]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert finished.returncode == 0, finished.stderr[-3000:]
        summary = json.loads(finished.stdout)
        assert summary["status"] == "completed"
        assert len(summary["sites"]) == len(site_files)
        digests[engine] = summary["state_digest"]
    assert digests["ray"] == digests["inprocess"]
