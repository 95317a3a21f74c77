"""Five fixed small runs, held against what they came to before: every loss, and the digest of the final state.

The laws say that two ways of training agree; these say that neither has changed. `tests/trajectories.json` holds the
figures with the versions that made them; `WRITE_TRAJECTORIES=1` writes it anew (say in the commit why it had to be).
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder

FILE = Path(__file__).with_name("trajectories.json")
DROPOUT = {"lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}}
ROUNDS = {"rounds": 3, "local_steps": 2}
LINEAR = {"lr_scheduler_type": "linear"}
REWARD = "def shortness(prompts, completions):\n    return [-len(text) / 10 for text in completions]\n"
RUNS: dict[str, dict[str, Any]] = {
    # Some 45 examples in batches of 4, three to a step: an epoch ends within a step's batches, and between two steps.
    "central": {
        "tuning": DROPOUT,
        "training": {
            "gradient_accumulation_steps": 3,
            "max_steps": 8,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "weight_decay": 0.01,
        },
    },
    "federated": {"tuning": DROPOUT, "training": LINEAR, "topology": {"kind": "federated", **ROUNDS}},
    "masked": {
        "tuning": {"mode": "full"},
        "training": LINEAR,
        "topology": {"kind": "federated", **ROUNDS},
        "privacy": {"secure_aggregation": {"threshold": 0.55, "minimum_sites": 2}},
    },
    "gossip": {"tuning": DROPOUT, "training": LINEAR, "topology": {"kind": "gossip", **ROUNDS}},
    "ppo": {
        "stage": "ppo",
        "training": {"learning_rate": 1e-3, "gradient_accumulation_steps": 2, "max_steps": 3, **LINEAR},
        "data": {"columns": {"prompt": "question"}},
        "rollout": {"max_new_tokens": 8},
        "ppo": {"num_mini_batches": 2, "num_ppo_epochs": 2, "kl_target": 1.0},
    },
}


def versions() -> dict[str, str]:
    """What decides over the last bit of a float."""
    import peft
    import torch
    import transformers

    return {
        "torch": torch.__version__.partition("+")[0],  # its CPU and CUDA builds compute alike here
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "machine": platform.machine(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
    }


def central(recipe: Recipe) -> dict[str, Any]:
    """A step at a time: also what pausing may not change."""
    from core_training.engine.engine import open_engine

    engine = open_engine(recipe)
    losses = [engine.train(1).loss_mean for _ in range(engine.total_steps)]
    return {"losses": losses, "digest": engine.read_state().digest}


def shared(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The loss of each round at each site."""
    from simulations import simulate

    summary = simulate(recipe, RunFolder(folder))
    sites = sorted((folder / "sites").iterdir())
    losses = [event["loss"] for site in sites for event in RunFolder(site).lines("trained")] or [
        event["loss"] for site in sites for run in sorted(site.iterdir()) for event in RunFolder(run).lines("trained")
    ]
    return {"losses": [*losses, summary.eval_loss], "digest": summary.state_digest}


@pytest.mark.parametrize("name", RUNS)
def test_a_fixed_run_comes_to_what_it_came_to_before(
    make_recipe: Callable[..., Recipe], site_files: list[Path], tmp_path: Path, name: str
) -> None:
    settings = dict(RUNS[name])
    if "topology" in settings:
        settings["simulation"] = {"sites": [str(path) for path in site_files]}
    if "rollout" in settings:
        (tmp_path / "reward.py").write_text(REWARD)
        settings["rollout"] = {**settings["rollout"], "reward_function": f"{tmp_path / 'reward.py'}:shortness"}
    recipe = make_recipe(**settings)
    came_to = shared(recipe, tmp_path / "run") if "topology" in settings else central(recipe)
    recorded = json.loads(FILE.read_text()) if FILE.exists() else {}
    if os.environ.get("WRITE_TRAJECTORIES"):
        document = {**recorded, "versions": versions(), name: came_to}
        FILE.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
        return
    assert came_to["losses"], "a run without a loss proves nothing"
    assert came_to["losses"] == pytest.approx(recorded[name]["losses"], rel=1e-4)
    if versions() == recorded["versions"]:
        assert came_to == recorded[name]
