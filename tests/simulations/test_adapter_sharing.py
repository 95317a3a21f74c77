"""Runs in which a part of the adapters trains or travels, in both topologies, masked and not, killed and gone on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_training.engine.engine import open_engine
from core_training.foundation.state import TrainableState
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.checkpoints import read_checkpoint
from core_training.runs.result_format import read_result
from core_training.runs.run_folder import RunFolder, Summary
from server.rewinding import rewind
from server.run_store import RunStore
from simulations import simulate
from strategies.messages import Envelope
from tests.failing_sites import federate

MakeRecipe = Callable[..., Recipe]
MASKED = {"secure_aggregation": {"threshold": 0.55, "minimum_sites": 2}}
RANKS = {"site0": 1, "site2": 3}


@pytest.fixture
def shared(make_recipe: MakeRecipe, site_files: list[Path]) -> MakeRecipe:
    def make(adapters: str, kind: str = "federated", ranks: dict[str, int] | None = None, **privacy: Any) -> Recipe:
        return make_recipe(
            topology={"kind": kind, "rounds": 3, "local_steps": 2, "keep_rounds": 9},
            aggregation={"adapters": adapters},
            privacy=privacy,
            tuning={"lora": {"r": 4, "lora_alpha": 8, "site_ranks": ranks or {}}},
            training={"weight_decay": 0.1},
            simulation={"sites": [str(path) for path in site_files]},
        )

    return make


def run(recipe: Recipe, folder: Path) -> Summary:
    return simulate(recipe, RunFolder(folder))


def state_after(folder: Path, number: int) -> TrainableState:
    return RunStore(RunFolder(folder), 9).read(number)[1]


def moved(before: TrainableState, after: TrainableState) -> set[str]:
    pairs = zip(before.tensors(), after.tensors(), strict=True)
    return {name.split(".")[-2] for (name, old), (_, new) in pairs if not np.array_equal(old, new)}


@pytest.mark.parametrize(("adapters", "turns"), [("ffa", ["lora_B"] * 3), ("rolora", ["lora_B", "lora_A", "lora_B"])])
def test_each_round_moves_what_its_turn_says(
    shared: MakeRecipe, tmp_path: Path, adapters: str, turns: list[str]
) -> None:
    run(shared(adapters), tmp_path / "run")
    states = [open_engine(shared(adapters)).initial_state, *(state_after(tmp_path / "run", n) for n in (1, 2, 3))]
    assert [moved(*pair) for pair in pairwise(states)] == [{factor} for factor in turns]


@pytest.mark.parametrize(
    ("adapters", "ranks"), [("both", RANKS), ("ffa", None), ("rolora", RANKS), ("rolora", None), ("fedsa", None)]
)
def test_masks_and_topology_change_no_bit(
    shared: MakeRecipe, tmp_path: Path, adapters: str, ranks: dict[str, int] | None
) -> None:
    plain = run(shared(adapters, ranks=ranks, codec="ring16"), tmp_path / "plain")
    gossip = run(shared(adapters, "gossip", ranks=ranks, codec="ring16"), tmp_path / "gossip")
    assert plain.state_digest == gossip.state_digest
    if ranks is None:
        masked = run(shared(adapters, **MASKED), tmp_path / "masked")
        assert (masked.state_digest, masked.eval_loss) == (plain.state_digest, plain.eval_loss)
    assert plain.eval_loss is not None
    assert plain.eval_loss_initial is not None
    assert plain.eval_loss < plain.eval_loss_initial


@pytest.mark.parametrize("adapters", ["rolora", "fedsa"])
def test_gossip_in_the_clear_is_the_server(shared: MakeRecipe, tmp_path: Path, adapters: str) -> None:
    server = run(shared(adapters), tmp_path / "server")
    assert run(shared(adapters, "gossip"), tmp_path / "gossip").state_digest == server.state_digest


@pytest.mark.parametrize("adapters", ["ffa", "rolora", "fedsa"])
def test_half_of_the_values_go_up(shared: MakeRecipe, tmp_path: Path, adapters: str) -> None:
    whole, part = (run(shared(a, codec="ring32"), tmp_path / a) for a in ("both", adapters))
    assert whole.bytes_up is not None
    assert part.bytes_up is not None
    assert 0.3 < part.bytes_up / whole.bytes_up < 0.75


def test_each_site_ends_with_a_factor_of_its_own_and_the_server_with_none(shared: MakeRecipe, tmp_path: Path) -> None:
    run(shared("fedsa"), tmp_path / "run")
    manifest = state_after(tmp_path / "run", 3).manifest
    server = read_result(tmp_path / "run" / "adapter", manifest)
    sites = [
        dict(read_result(tmp_path / "run" / "sites" / f"site{i}" / "run" / "adapter", manifest).tensors())
        for i in range(3)
    ]
    for name, common in server.tensors():
        own = [site[name] for site in sites]
        if "lora_B" in name:
            assert not common.any()
            assert len({values.tobytes() for values in own}) == 3
        else:
            assert all(np.array_equal(values, common) for values in own)


def test_gossip_of_such_sites_has_no_result_of_all(shared: MakeRecipe, tmp_path: Path) -> None:
    run(shared("fedsa", "gossip"), tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()


def test_the_components_behind_a_sites_rank_do_not_move(
    shared: MakeRecipe, site_files: list[Path], tmp_path: Path
) -> None:
    recipe = shared("both", ranks={path.stem: 1 for path in site_files})
    run(recipe, tmp_path / "run")
    after = dict(state_after(tmp_path / "run", 3).tensors())
    for name, values in open_engine(recipe).initial_state.tensors():
        first, rest = (np.s_[:1], np.s_[1:]) if "lora_A" in name else (np.s_[:, :1], np.s_[:, 1:])
        assert not np.array_equal(values[first], after[name][first])
        np.testing.assert_array_equal(values[rest], after[name][rest])


def test_a_site_goes_back_to_its_own_factor_with_the_server(shared: MakeRecipe, tmp_path: Path) -> None:
    whole = run(shared("fedsa"), tmp_path / "run")
    rewind(tmp_path / "run", 1)
    again = simulate(shared("fedsa"), RunFolder(tmp_path / "run"), resume=True)
    assert (again.state_digest, again.eval_loss) == (whole.state_digest, whole.eval_loss)


@pytest.mark.parametrize("comes_back", [True, False], ids=["it trains on", "it is there at the end"])
def test_a_site_that_is_away_after_a_run_was_taken_back_has_no_factor_of_rounds_that_were_undone(
    shared: MakeRecipe, tmp_path: Path, comes_back: bool
) -> None:
    """It may have what it made of the state that the run was taken back to, as of any round that it was late in."""
    run(shared("fedsa"), tmp_path / "run")
    manifest = state_after(tmp_path / "run", 3).manifest
    (site,) = (tmp_path / "run" / "sites" / "site2").iterdir()
    own = [read_checkpoint(site / "checkpoints" / f"round-00000{n}", manifest)[0] for n in (1, 2, 3)]
    rewind(tmp_path / "run", 0)

    def away(name: str, order: Envelope) -> str | None:
        last = 2 if comes_back else 3
        return "before" if name == "site2" and order.kind == "train" and order.fields["round"] <= last else None

    federate(shared("fedsa"), tmp_path / "run", away)
    if comes_back:  # it stood at the end of round 1 when it went on in round 3
        caught_up = list(RunFolder(site).events(events.CaughtUp))
        assert [(event.round, event.engine_round) for event in caught_up] == [(2, 1)]
        return
    for name, values in read_result(site / "adapter", manifest).tensors():
        if "lora_B" in name:
            assert [np.array_equal(values, dict(state.tensors())[name]) for state in own] == [True, False, False]


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and tidy up."""


@pytest.mark.parametrize("adapters", ["rolora", "fedsa"])
def test_a_run_that_was_killed_goes_on_as_if_never_killed(shared: MakeRecipe, tmp_path: Path, adapters: str) -> None:
    whole = run(shared(adapters), tmp_path / "whole")

    def kill(number: int, *_: Any) -> None:
        if number == 2:
            raise Killed

    with pytest.raises(Killed):
        simulate(shared(adapters), RunFolder(tmp_path / "killed"), kill)
    resumed = simulate(shared(adapters), RunFolder(tmp_path / "killed"), resume=True)
    assert (resumed.state_digest, resumed.eval_loss) == (whole.state_digest, whole.eval_loss)
