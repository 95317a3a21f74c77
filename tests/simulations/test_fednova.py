"""Runs by FedNova whose sites take steps of their own number, end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_training.engine.engine import open_engine
from core_training.foundation.errors import InputError
from core_training.recipe.schema import Recipe
from core_training.runs.checkpoints import read_checkpoint
from core_training.runs.run_folder import RunFolder
from server.run_store import RunStore
from simulations import simulate

MakeRecipe = Callable[..., Recipe]


def test_each_round_adds_the_mean_of_the_changes_over_their_steps(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path
) -> None:
    recipe = make_recipe(
        topology={"kind": "federated", "rounds": 2, "local_epochs": 1.0},
        aggregation={"rule": "fednova", "weights": "records"},
        training={"optim": "sgd", "learning_rate": 0.5, "max_steps": None},
        simulation={"sites": [str(path) for path in site_files]},
    )
    summary = simulate(recipe, RunFolder(tmp_path / "run"))
    engine = open_engine(recipe)
    start, sites = engine.initial_state, summary.sites
    assert sites is not None
    for number in (1, 2):
        folders = [tmp_path / "run" / "sites" / path.stem / "run" / "checkpoints" for path in site_files]
        trained = [read_checkpoint(folder / f"round-{number:06d}", engine.manifest) for folder in folders]
        steps = np.array([notes["train"]["steps"] for _, notes in trained])
        assert len(set(steps)) > 1
        weights = np.array([sites[path.stem].train_examples for path in site_files], dtype=np.float64)
        shares = weights / weights.sum()
        changes = np.stack([state.buffer.astype(np.float64) - start.buffer for state, _ in trained])
        after = RunStore(RunFolder(tmp_path / "run")).read(number)[1]
        np.testing.assert_allclose(
            after.buffer, start.buffer + (shares @ steps) * (shares / steps) @ changes, atol=1e-6
        )
        start = after
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"
    assert summary.eval_loss is not None
    assert summary.eval_loss_initial is not None
    assert summary.eval_loss < summary.eval_loss_initial


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"training": {"optim": "adamw_torch"}}, "under AdamW it has learnt less than the mean"),
        ({"training": {"optim_args": "momentum=0.9"}}, "is right for plain SGD alone"),
        ({"aggregation": {"proximal_mu": 0.1}}, "proximal_mu holds later ones back"),
        ({"topology": {"kind": "gossip"}}, "aggregation.rule: 'fednova' is a server's"),
        ({"privacy": {"codec": "ring16"}}, "ring16 carries sums, and rule 'fednova' needs each site's state"),
    ],
)
def test_what_it_cannot_go_together_with_is_refused(
    make_recipe: MakeRecipe, sections: dict[str, Any], said: str
) -> None:
    topology = {"kind": "federated", "rounds": 2, "local_steps": 1, **sections.pop("topology", {})}
    aggregation = {"rule": "fednova", **sections.pop("aggregation", {})}
    training = {"optim": "sgd", **sections.pop("training", {})}
    with pytest.raises(InputError) as error:
        make_recipe(topology=topology, aggregation=aggregation, training=training, **sections)
    assert said in str(error.value)
