"""Outer steps in gossip groups: each node takes the server's step, and what it remembers goes with the state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_training.recipe.schema import Recipe
from core_training.recipe.sections.aggregation import Outer
from core_training.runs.run_folder import RunFolder
from p2p.commits import CommitStore
from p2p.remembered import apart, together, whole_manifest
from simulations import simulate
from simulations.gossip import simulate_gossip
from simulations.network import Partition, SimulatedNetwork
from tests.p2p.linear_site import recipe_of, three_sites

MakeRecipe = Callable[..., Recipe]
REMEMBERS = {"nesterov": ["momentum"], "adam": ["first_moment", "second_moment"]}


class PowerCut(Exception):
    """Nothing that a site could report: the whole process is gone."""


def stepping(step: str, **options: Any) -> Recipe:
    recipe = recipe_of(privacy={"codec": "ring24", "clip": 16.0}, **options)
    aggregation = recipe.aggregation.model_copy(update={"outer": Outer(step=step)})
    return recipe.model_copy(update={"aggregation": aggregation})


def run(recipe: Recipe, folder: Path, network: SimulatedNetwork | None = None, **asks: Any) -> Any:
    answers = {name: site.ask for name, site in three_sites().items()}
    return simulate_gossip(recipe, {**answers, **asks}, RunFolder(folder), network)


def digests(folder: Path, step: str) -> set[str]:
    """Those of the nodes' last states with what is remembered of them."""
    manifest = three_sites()["alpha"].manifest
    stores = (CommitStore(folder / "sites" / name / "checkpoints") for name in three_sites())
    return {store.load_last(manifest, REMEMBERS[step]).state_digest for store in stores}


@pytest.mark.parametrize("step", ["nesterov", "adam"])
def test_a_group_steps_as_a_server_does_bit_for_bit(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, step: str
) -> None:
    def state_after(kind: str) -> str | None:
        recipe = make_recipe(
            topology={"kind": kind, "rounds": 3, "local_steps": 1},
            aggregation={"outer": {"step": step}},
            privacy={"codec": "ring16"},
            simulation={"sites": [str(path) for path in site_files]},
        )
        return simulate(recipe, RunFolder(tmp_path / kind)).state_digest

    assert state_after("gossip") == state_after("federated")


@pytest.mark.parametrize("step", REMEMBERS)
def test_a_node_that_was_cut_off_takes_up_what_the_others_remember(tmp_path: Path, step: str) -> None:
    network = SimulatedNetwork(seed=1, latency=0.5, partitions=[Partition(100.0, 300.0, frozenset({"gamma"}))])
    summary = run(stepping(step, rounds=30, minimum_sites=2), tmp_path, network)
    assert summary.state_digest is not None
    assert list(RunFolder(tmp_path / "sites" / "gamma").lines("adopted"))
    assert len(digests(tmp_path, step)) == 1


@pytest.mark.parametrize("step", REMEMBERS)
def test_a_run_that_was_cut_goes_on_with_what_it_remembered(tmp_path: Path, step: str) -> None:
    recipe = stepping(step, rounds=6)
    whole = run(recipe, tmp_path / "whole")
    asks = {name: site.ask for name, site in three_sites().items()}

    async def dies(order: Any, ask: Any = asks["beta"]) -> Any:
        if order.fields.get("round") == 4:
            raise PowerCut
        return await ask(order)

    with pytest.RaisesGroup(PowerCut):
        run(recipe, tmp_path / "cut", beta=dies)
    assert run(recipe, tmp_path / "cut").state_digest == whole.state_digest
    assert digests(tmp_path / "cut", step) == digests(tmp_path / "whole", step)


def test_a_round_that_is_void_leaves_what_is_remembered(tmp_path: Path) -> None:
    network = SimulatedNetwork(seed=1, latency=0.1, partitions=[Partition(40.0, 180.0, frozenset({"gamma"}))])
    recipe = stepping("nesterov", rounds=5, minimum_sites=3, deadline=60.0)
    undisturbed = run(recipe, tmp_path / "whole")
    disturbed = run(recipe, tmp_path / "cut", network)
    assert disturbed.void_rounds
    assert undisturbed.eval_loss == pytest.approx(disturbed.eval_loss, rel=0.05)
    assert len(digests(tmp_path / "cut", "nesterov")) == 1


def test_a_state_and_what_is_remembered_of_it_are_one_and_come_apart_again() -> None:
    site = three_sites()["alpha"]
    state = site.initial()
    memory = {name: type(state)(state.manifest, state.buffer * factor) for name, factor in (("u", 2), ("v", 3))}
    whole = together(state, memory)
    assert whole.manifest == whole_manifest(state.manifest, memory)
    again, remembered = apart(whole, state.manifest, memory)
    assert again.digest == state.digest
    assert {name: values.digest for name, values in remembered.items()} == {
        name: values.digest for name, values in memory.items()
    }
    assert together(state, {}) is state
    assert np.array_equal(apart(state, state.manifest, ())[0].buffer, state.buffer)
