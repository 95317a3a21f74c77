"""Runs whose server makes adapters anew of their mean product, end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_training.engine.engine import open_engine
from core_training.foundation.errors import InputError
from core_training.foundation.state import TrainableState
from core_training.recipe.schema import Recipe
from core_training.runs.checkpoints import read_checkpoint
from core_training.runs.run_folder import RunFolder
from server.run_store import RunStore
from simulations import simulate

MakeRecipe = Callable[..., Recipe]
R = 4


@pytest.fixture
def shared(make_recipe: MakeRecipe, site_files: list[Path]) -> MakeRecipe:
    def make(
        rule: str = "flexlora", files: list[Path] | None = None, weights: str = "loss_units", **sections: Any
    ) -> Recipe:
        return make_recipe(
            topology={"kind": "federated", "rounds": 2, "local_steps": 3},
            aggregation={"rule": rule, "weights": weights},
            simulation={"sites": [str(path) for path in files or site_files]},
            **sections,
        )

    return make


def products(state: TrainableState) -> dict[str, np.ndarray]:
    tensors = {name: view.astype(np.float64) for name, view in state.tensors()}
    return {name: tensors[name.replace("lora_A", "lora_B")] @ a for name, a in tensors.items() if ".lora_A." in name}


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_each_round_leads_to_the_nearest_of_the_rank_to_the_mean_of_what_the_sites_trained(
    shared: MakeRecipe, site_files: list[Path], tmp_path: Path, codec: str
) -> None:
    recipe = shared(weights="equal", privacy={"codec": codec})
    summary = simulate(recipe, RunFolder(tmp_path / "run"))
    manifest = open_engine(recipe).manifest
    for number in (1, 2):
        made = products(RunStore(RunFolder(tmp_path / "run")).read(number)[1])
        folders = [tmp_path / "run" / "sites" / path.stem / "run" / "checkpoints" for path in site_files]
        trained = [products(read_checkpoint(folder / f"round-{number:06d}", manifest)[0]) for folder in folders]
        for name, product in made.items():
            u, sizes, v = np.linalg.svd(np.mean([site[name] for site in trained], axis=0))
            nearest = (u[:, :R] * sizes[:R]) @ v[:R]
            np.testing.assert_allclose(product, nearest, atol={"fp32": 1e-6, "bf16": 2e-3}[codec])
    assert summary.eval_loss is not None
    assert summary.eval_loss_initial is not None
    assert summary.eval_loss < summary.eval_loss_initial


def test_of_one_site_it_is_federated_averaging(shared: MakeRecipe, site_files: list[Path], tmp_path: Path) -> None:
    one = site_files[1:2]
    plain = simulate(shared("fedavg", one), RunFolder(tmp_path / "plain"))
    assert simulate(shared(files=one), RunFolder(tmp_path / "flex")).state_digest == plain.state_digest


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"tuning": {"mode": "full"}}, "aggregation.rule: 'flexlora' is for the factors of LoRA"),
        ({"privacy": {"codec": "ring16"}}, "ring16 carries sums, and rule 'flexlora' needs each site's state"),
        ({"privacy": {"secure_aggregation": True}}, "ring16 carries sums, and rule 'flexlora' needs each site's state"),
        ({"topology": {"kind": "gossip"}}, "aggregation.rule: 'flexlora' is a server's"),
        ({"aggregation": {"adapters": "ffa"}}, "'flexlora' makes both factors anew, all components"),
        ({"tuning": {"lora": {"r": 4, "site_ranks": {"site0": 2}}}}, "makes both factors anew, all components"),
        ({"aggregation": {"outer": {"step": "nesterov"}}}, "makes factors that are no mean of the sites'"),
    ],
)
def test_what_it_cannot_go_together_with_is_refused(
    make_recipe: MakeRecipe, sections: dict[str, Any], said: str
) -> None:
    topology = {"kind": "federated", "rounds": 2, "local_steps": 1, **sections.pop("topology", {})}
    aggregation = {"rule": "flexlora", **sections.pop("aggregation", {})}
    with pytest.raises(InputError) as error:
        make_recipe(topology=topology, aggregation=aggregation, **sections)
    assert said in str(error.value)
