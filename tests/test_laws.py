"""The laws that hold the topologies together (docs/decisions/001): one engine, whoever drives it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_training.engine.central import train
from core_training.engine.engine import open_engine
from core_training.foundation.state import TrainableState
from core_training.recipe.schema import Recipe
from core_training.runs.events import Evaluated, Round, StepsLogged
from core_training.runs.run_folder import RunFolder
from server.run_store import RunStore
from simulations import simulate
from tests import tiny

MakeRecipe = Callable[..., Recipe]
DROPOUT = {"lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}}


def central_digest(recipe: Recipe, folder: Path) -> str | None:
    engine = open_engine(recipe)
    run = RunFolder(folder)
    run.prepare(recipe, resume=False)
    return train(recipe, engine, run).state_digest


def simulated(recipe: Recipe, folder: Path, resume: bool = False, on_round: Any = lambda *_: None) -> Any:
    return simulate(recipe, RunFolder(folder), on_round, resume=resume)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("kind", ["federated", "gossip"])
def test_law_1_one_site_in_any_topology_is_central_training_bit_for_bit(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, kind: str, mode: str
) -> None:
    settings = {
        "tuning": {**DROPOUT, "mode": mode},
        "training": {"max_steps": 6, "warmup_steps": 2, "lr_scheduler_type": "cosine"},
        "data": {"train": str(site_files[1])},
        "simulation": {"sites": [str(site_files[1])]},
    }
    central = make_recipe(**settings)
    shared = make_recipe(**settings, topology={"kind": kind, "rounds": 3, "local_steps": 2})
    summary = simulated(shared, tmp_path / kind)
    assert summary.state_digest == central_digest(central, tmp_path / "central")


@pytest.mark.parametrize("kind", ["federated", "gossip"])
def test_law_1_holds_for_what_a_recipe_leaves_out(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, kind: str
) -> None:
    """Learning rate, schedule and local steps: one site gets what a central run gets."""
    settings: dict[str, Any] = {
        "training": {"learning_rate": None, "max_steps": None, "logging_steps": 1},
        "data": {"train": str(site_files[1])},
        "simulation": {"sites": [str(site_files[1])]},
    }
    shared = simulated(make_recipe(**settings, topology={"kind": kind, "rounds": 2}), tmp_path / kind)
    central = make_recipe(**settings, topology={"kind": "central", "rounds": 2})
    assert shared.state_digest == central_digest(central, tmp_path / "central")
    assert _rates(tmp_path / "central") == pytest.approx([3.2e-3] * 8 + [2 / 3 * 3.2e-3, 1 / 3 * 3.2e-3])


def _rates(run: Path) -> list[float]:
    return [event.learning_rate for event in RunFolder(run).events(StepsLogged)]


@pytest.mark.parametrize("kind", ["federated", "gossip"])
def test_a_rate_that_nobody_named_grows_with_the_sites_and_a_run_goes_on_with_it(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, kind: str
) -> None:
    recipe = make_recipe(
        training={"learning_rate": None, "logging_steps": 1},
        topology={"kind": kind, "rounds": 2, "local_steps": 1},
        simulation={"sites": [str(path) for path in site_files]},
    )
    first = simulated(recipe, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert folder.recipe.topology.sites == len(site_files)
    own = "run" if kind == "federated" else "simulation"
    for path in site_files:
        rates = _rates(tmp_path / "run" / "sites" / path.stem / own)
        assert rates == pytest.approx([3.2e-3 * len(site_files) ** 0.5] * 2)
    assert folder.completed(folder.pinned(recipe)) is not None
    longer = recipe.model_copy(update={"topology": recipe.topology.model_copy(update={"rounds": 3})})
    assert simulated(folder.pinned(longer), tmp_path / "run", resume=True).rounds_done > first.rounds_done


@pytest.mark.parametrize("kind", ["federated", "gossip"])
def test_a_rounds_held_out_loss_is_that_of_the_state_it_began_with(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, kind: str
) -> None:
    settings = {
        "training": {"max_steps": 6, "save_steps": 2, "learning_rate": 1e-2},
        "data": {"train": str(site_files[1]), "eval_fraction": 0.3},
        "simulation": {"sites": [str(site_files[1])]},
    }
    simulated(make_recipe(**settings, topology={"kind": kind, "rounds": 3, "local_steps": 2}), tmp_path / kind)
    central_digest(make_recipe(**settings), tmp_path / "central")
    told = [event.eval_loss for event in RunFolder(tmp_path / kind).events(Round)]
    before = [event.loss for event in RunFolder(tmp_path / "central").events(Evaluated)]
    assert told == before[:3]
    assert len(set(before)) == 4


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("sites", [2, 4])
def test_law_2_one_local_sgd_step_is_one_central_step_on_the_joined_batch(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, mode: str, sites: int
) -> None:
    """Sites of unequal size, each with all its records in its one batch; weights by loss tokens."""
    fourth = tiny.write_jsonl(tmp_path / "site3.jsonl", tiny.questions(3, 33))
    files = [str(path) for path in [*site_files, fourth][:sites]]
    settings: dict[str, Any] = {
        "tuning": {"mode": mode},
        "data": {"train": files},
        "training": {
            "optim": "sgd",
            "learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "per_device_train_batch_size": 128,
            "max_steps": 1,
        },
        "simulation": {"sites": files},
    }
    engine = open_engine(make_recipe(**settings))
    start = engine.read_state()
    engine.train(1)
    central = engine.read_state()
    recipe = make_recipe(**settings, topology={"kind": "federated", "rounds": 1, "local_steps": 1})
    simulated(recipe, tmp_path / "run")
    committed = RunStore(RunFolder(tmp_path / "run")).latest()
    assert committed is not None
    federated = committed[1]
    assert np.abs(central.buffer - start.buffer).max() > 1e-3
    np.testing.assert_allclose(federated.buffer, central.buffer, atol=1e-5)


def test_law_3_gossip_on_a_complete_graph_is_federated_averaging(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path
) -> None:
    settings = {"simulation": {"sites": [str(path) for path in site_files]}}
    topology = {"rounds": 3, "local_steps": 2}
    federated = simulated(make_recipe(**settings, topology={**topology, "kind": "federated"}), tmp_path / "federated")
    gossip = simulated(make_recipe(**settings, topology={**topology, "kind": "gossip"}), tmp_path / "gossip")
    assert gossip.state_digest == federated.state_digest
    assert gossip.eval_loss == pytest.approx(federated.eval_loss, abs=1e-6)
    by_server = RunStore(RunFolder(tmp_path / "federated")).latest()
    assert by_server is not None
    for path in site_files:
        last = max((tmp_path / "gossip" / "sites" / path.stem / "checkpoints").glob("epoch-*")) / "state.safetensors"
        state = TrainableState.from_bytes(last.read_bytes(), by_server[1].manifest)
        np.testing.assert_allclose(state.buffer, by_server[1].buffer, atol=1e-6)


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and tidy up."""


@pytest.mark.parametrize("after_round", [1, 2])
def test_law_4_a_federation_killed_after_a_commit_goes_on_as_if_never_killed(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, after_round: int
) -> None:
    recipe = make_recipe(
        tuning=DROPOUT,
        simulation={"sites": [str(path) for path in site_files]},
        topology={"kind": "federated", "rounds": 4, "local_steps": 2},
    )
    whole = simulated(recipe, tmp_path / "whole")

    def kill(number: int, loss: float | None) -> None:
        if number == after_round:
            raise Killed

    with pytest.raises(Killed):
        simulated(recipe, tmp_path / "killed", on_round=kill)
    resumed = simulated(recipe, tmp_path / "killed", resume=True)
    assert resumed.state_digest == whole.state_digest
    assert resumed.train_loss_first == whole.train_loss_first
    assert resumed.tokens_trained == whole.tokens_trained


def test_law_4_a_federation_killed_within_a_round_goes_on_as_if_never_killed(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first sites have trained the round and committed it; the server has not."""
    recipe = make_recipe(
        tuning=DROPOUT,
        simulation={"sites": [str(path) for path in site_files]},
        topology={"kind": "federated", "rounds": 3, "local_steps": 2},
    )
    whole = simulated(recipe, tmp_path / "whole")
    from client.site import SiteService

    handle, calls = SiteService.handle, iter(range(1000))

    def dies(self: SiteService, order: Any) -> Any:
        if order.kind == "train" and next(calls) == 5:  # the third site in round 2
            raise Killed
        return handle(self, order)

    monkeypatch.setattr(SiteService, "handle", dies)
    with pytest.raises(Killed):
        simulated(recipe, tmp_path / "killed")
    monkeypatch.undo()
    resumed = simulated(recipe, tmp_path / "killed", resume=True)
    assert resumed.state_digest == whole.state_digest


def test_law_4_central_training_stopped_at_any_step_goes_on_bit_for_bit(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(tuning=DROPOUT, training={"max_steps": 7, "save_steps": 3})
    whole = central_digest(recipe, tmp_path / "whole")
    for stop_at in (1, 4, 6):
        run = RunFolder(tmp_path / f"stopped-{stop_at}")
        run.prepare(recipe, resume=False)
        with pytest.raises(Killed):
            train(recipe, open_engine(recipe), run, resume=False, on_step=_kill_at(stop_at))
        summary = train(recipe, open_engine(recipe), run, resume=True)
        assert summary.state_digest == whole


def _kill_at(deadly: int) -> Callable[[int, int], None]:
    def on_step(step: int, total: int) -> None:
        if step == deadly:
            raise Killed

    return on_step
