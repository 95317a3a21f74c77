"""A round for which too few came together is void at every node: it changes nothing, and no run completes by it."""

import json

import pytest

from core_training.foundation.errors import RunError
from core_training.runs.run_folder import RunFolder
from simulations.network import Partition, SimulatedNetwork
from tests.p2p.linear_site import recipe_of, three_sites
from tests.p2p.test_simulated_gossip import events, final_states, run

CODECS = {
    "fp32": {},
    "bf16": {"codec": "bf16"},
    "ring16": {"codec": "ring16", "clip": 16.0},
    "masked": {"secure_aggregation": True, "clip": 16.0},
}


def unset(recipe):
    """The recipe with no word on how many sites it takes."""
    return recipe.model_copy(update={"topology": recipe.topology.model_copy(update={"minimum_sites": None})})


def alone(sites):
    """A network on which nobody hears of anybody."""
    return SimulatedNetwork(seed=1, partitions=[Partition(0.0, 1e9, frozenset({name})) for name in sites])


@pytest.mark.parametrize("mixing", ["group", "metropolis"])
@pytest.mark.parametrize("codec", CODECS)
def test_a_node_that_is_alone_learns_nothing_and_fails_with_the_names_of_who_was_missing(tmp_path, codec, mixing):
    if mixing == "metropolis" and codec in ("ring16", "masked"):
        pytest.skip("rings are summed up in groups")
    sites = three_sites()
    recipe = unset(recipe_of(rounds=2, mixing=mixing, deadline=20.0, privacy=CODECS[codec], learning_rate=1.0))
    with pytest.raises(RunError, match=r"3 rounds in a row were void: it takes . nodes; missing") as failure:
        run(sites, recipe, tmp_path, alone(sites))
    assert failure.value.exit_code == 1
    name, others = str(failure.value).split("'")[1], set(sites)
    assert all(other in str(failure.value).partition("missing")[2] for other in others - {name})
    for folder in (tmp_path, tmp_path / "sites" / name):
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["status"], summary["rounds_done"], summary["void_rounds"]) == ("failed", 0, 3)
        assert summary["state_digest"] is None
    assert [event["contributors"] for event in events(tmp_path, name, "epoch_void")] == [[]] * 3
    assert events(tmp_path, name, "epoch") == []
    state = final_states(sites, tmp_path)[name]
    assert state is None or state.digest == sites[name].initial().digest
    assert not [order for order in sites[name].orders if order[0] == "evaluate"], "there is no result to keep"


def test_void_rounds_take_no_longer_than_their_deadlines(tmp_path):
    sites = three_sites()
    with pytest.raises(RunError):
        run(sites, unset(recipe_of(rounds=2, deadline=20.0)), tmp_path, alone(sites))
    seconds = [event["seconds"] for event in events(tmp_path, "alpha", "epoch_void")]
    assert all(30.0 <= one <= 30.0 + 20.0 + 1.0 for one in seconds), "thirty seconds of training, and the deadline"


def test_a_failed_run_goes_on_once_the_others_are_there(tmp_path):
    sites, recipe = three_sites(), unset(recipe_of(rounds=2, deadline=20.0))
    with pytest.raises(RunError):
        run(sites, recipe, tmp_path, alone(sites))
    summary = run(sites, recipe, tmp_path)
    whole = run(three_sites(), recipe, tmp_path / "whole")
    assert (summary.status, summary.rounds, summary.state_digest) == ("completed", 2, whole.state_digest)
    assert RunFolder(tmp_path).has_completed


def test_a_node_that_was_cut_off_takes_the_others_state_and_adds_nothing_it_learned_alone(tmp_path):
    sites = three_sites()
    network = SimulatedNetwork(seed=1, latency=0.1, partitions=[Partition(100.0, 400.0, frozenset({"gamma"}))])
    summary = run(sites, unset(recipe_of(rounds=30)), tmp_path, network)
    assert summary.state_digest is not None
    assert events(tmp_path, "gamma", "adopted")
    assert all(len(event["contributors"]) > 1 for event in events(tmp_path, "gamma", "epoch"))
