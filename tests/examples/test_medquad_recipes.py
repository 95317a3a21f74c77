"""The MedQuAD recipes: one recipe for three topologies, which runs where the data is."""

from pathlib import Path

import pytest

from core_training.distributed.launch import opened_engine
from core_training.engine.central import train
from core_training.recipe.reading import load_recipe
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from simulations import simulate

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "medquad"
DATA = ROOT.parent / "shared" / "data" / "medquad"
KINDS = ("federated", "gossip", "central")
SITES = ("cdc", "nhlbi")

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")


def miniature(kind: str) -> Recipe:
    files = ", ".join(str(DATA / f"{name}.jsonl.gz") for name in SITES)
    return load_recipe(
        FOLDER / f"{kind}.yaml",
        [
            f"data.train=[{files}]",
            f"simulation.sites=[{files}]",
            "data.eval_fraction=0.02",
            "training.max_length=48",
            "training.max_steps=4",
            "topology.rounds=2",
            "topology.local_steps=1",
            "topology.eval_every=1",
        ],
    )


def test_the_three_recipes_differ_in_their_topology_and_output_alone():
    recipes = {kind: load_recipe(FOLDER / f"{kind}.yaml") for kind in KINDS}

    assert {kind: recipe.topology.kind for kind, recipe in recipes.items()} == {kind: kind for kind in KINDS}
    assert {kind: recipe.output for kind, recipe in recipes.items()} == {kind: f"runs/medquad/{kind}" for kind in KINDS}
    rest = [recipe.model_dump(exclude={"output": True, "topology": {"kind"}}) for recipe in recipes.values()]
    assert rest[0] == rest[1] == rest[2]


@needs_data
def test_central_training_takes_as_many_steps_as_all_sites_together():
    recipes = {kind: load_recipe(FOLDER / f"{kind}.yaml") for kind in KINDS}
    sites = len(list(DATA.glob("*.jsonl.gz")))

    assert recipes["central"].total_steps == sites * recipes["federated"].total_steps
    assert recipes["gossip"].total_steps == recipes["federated"].total_steps


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["federated", "gossip"])
def test_two_rounds_over_two_sites_lower_the_loss(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the recipes' paths are relative to the project's root

    summary = simulate(miniature(kind), RunFolder(tmp_path / "run"))

    assert summary.status == "completed"
    assert set(summary.sites) == set(SITES)
    assert summary.eval_loss < summary.eval_loss_initial
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@needs_data
@pytest.mark.slow
def test_a_few_central_steps_lower_the_loss(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe, folder = miniature("central"), RunFolder(tmp_path / "run")

    with opened_engine(recipe) as engine:
        folder.prepare(recipe, resume=False)
        summary = train(recipe, engine, folder)

    assert summary.eval_loss < summary.eval_loss_initial
    assert set(summary.sites) == set(SITES)
