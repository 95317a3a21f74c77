"""Real nodes on a network in memory: the laws of averaging, and everything that can go wrong on the way."""

import numpy as np
import pytest

from core_training.foundation.state import TrainableState
from core_training.runs.run_folder import RunFolder
from p2p.commits import CommitStore
from simulations.gossip import simulate_gossip
from simulations.network import Partition, SimulatedNetwork
from strategies.messages import Update
from tests.p2p.linear_site import LinearSite, federated_average, recipe_of, three_sites


class PowerCut(Exception):
    """Nothing that a site could report: the whole process is gone."""


def run(sites, recipe, folder, network=None):
    return simulate_gossip(recipe, {name: site.ask for name, site in sites.items()}, RunFolder(folder), network)


def final_states(sites, folder):
    return {
        name: CommitStore(folder / "sites" / name / "checkpoints").load_last(site.manifest).state
        for name, site in sites.items()
    }


def events(folder, name, kind):
    return list(RunFolder(folder / "sites" / name).lines(kind))


def test_law_3_group_gossip_is_federated_averaging_and_all_nodes_hold_the_same_bits(tmp_path):
    sites = three_sites()
    summary = run(sites, recipe_of(rounds=5), tmp_path)
    states = final_states(sites, tmp_path)
    assert {state.digest for state in states.values()} == {summary.state_digest}
    expected = federated_average(sites, 5).buffer
    assert np.abs(states["alpha"].buffer - expected).max() <= 1e-6
    assert summary.eval_loss < summary.eval_loss_initial
    assert [
        event["event"] for event in RunFolder(tmp_path / "sites" / "alpha").lines() if "refused" in event["event"]
    ] == []


def test_metropolis_on_the_complete_graph_is_the_plain_mean(tmp_path):
    sites = three_sites()
    run(sites, recipe_of(rounds=1, mixing="metropolis"), tmp_path)
    trained = [site.train_from(site.initial(), 3).buffer.astype(np.float64) for site in sites.values()]
    for state in final_states(sites, tmp_path).values():
        assert np.abs(state.buffer - np.mean(trained, axis=0)).max() <= 1e-6


def test_a_ring_terminates_and_its_nodes_come_close(tmp_path):
    sites = {f"{name}{number}": site for number in range(3) for name, site in three_sites().items()}
    summary = run(sites, recipe_of(rounds=12, mixing="metropolis", graph="ring"), tmp_path)
    assert summary.status == "completed"
    stacked = np.stack([state.buffer for state in final_states(sites, tmp_path).values()])
    assert np.abs(stacked - stacked.mean(axis=0)).max() < 0.5


def test_a_graph_terminates_and_its_nodes_come_close_the_sooner_a_word_spreads(tmp_path):
    apart = {}
    for graph in ("ring", "exponential"):
        # Those of one kind side by side: a ring of three kinds in turn would have all three around each node.
        sites = {f"{name}{number}": three_sites()[name] for name in three_sites() for number in range(3)}
        summary = run(sites, recipe_of(rounds=12, mixing="metropolis", graph=graph), tmp_path / graph)
        assert summary.status == "completed"
        stacked = np.stack([state.buffer for state in final_states(sites, tmp_path / graph).values()])
        apart[graph] = np.abs(stacked - stacked.mean(axis=0)).max()
    assert apart["exponential"] < apart["ring"] / 2


@pytest.mark.parametrize("count", [8, 6])
def test_nodes_with_one_partner_a_round_come_close_for_the_bytes_of_one_state(tmp_path, count):
    sites = {f"site{number}": list(three_sites().values())[number % 3] for number in range(count)}
    recipe = recipe_of(rounds=12, mixing="metropolis", graph="one_peer", minimum_sites=2)
    summary = run(sites, recipe, tmp_path)
    assert summary.status == "completed"
    stacked = np.stack([state.buffer for state in final_states(sites, tmp_path).values()])
    assert np.abs(stacked - stacked.mean(axis=0)).max() < 0.5
    mixed = [len(event["contributors"]) for name in sites for event in events(tmp_path, name, "epoch")]
    assert max(mixed) == 2
    assert (min(mixed) == 2) == (count == 8), "where they are no power of two, some sit out a round"
    assert summary.void_rounds == 0


def test_a_partner_whose_update_is_refused_holds_nobody_up(tmp_path):
    sites = {f"site{number}": list(three_sites().values())[number % 3] for number in range(4)}

    async def poisons(order, ask=sites["site2"].ask):
        reply = await ask(order)
        if order.kind != "train":
            return reply
        update = Update.open(reply)
        state = TrainableState.from_bytes(update.payload, sites["site2"].manifest)
        far = TrainableState(state.manifest, state.buffer + np.float32(1e9))
        return update.model_copy(update={"payload": far.to_bytes()}).envelope()

    asks = {name: site.ask for name, site in sites.items()}
    recipe = recipe_of(rounds=6, mixing="metropolis", graph="one_peer", minimum_sites=2, deadline=60.0)
    simulate_gossip(recipe, {**asks, "site2": poisons}, RunFolder(tmp_path))
    for name in ("site0", "site1", "site3"):
        assert len(events(tmp_path, name, "epoch")) == 6
        assert all("site2" not in event["contributors"] for event in events(tmp_path, name, "epoch"))


def test_a_partner_that_is_away_holds_nobody_up(tmp_path):
    sites = {f"site{number}": list(three_sites().values())[number % 3] for number in range(4)}
    network = SimulatedNetwork(seed=1, latency=0.5, partitions=[Partition(60.0, 1e9, frozenset({"site3"}))])
    recipe = recipe_of(rounds=12, mixing="metropolis", graph="one_peer", minimum_sites=1, deadline=60.0)
    run(sites, recipe, tmp_path, network)
    assert len(events(tmp_path, "site0", "epoch")) == 12
    assert any(event["contributors"] == ["site1"] for event in events(tmp_path, "site1", "epoch")), "without site3"


def test_one_node_alone_trains_as_if_central(tmp_path):
    site = three_sites()["alpha"]
    run({"alpha": site}, recipe_of(rounds=3), tmp_path)
    state = site.initial()
    for _ in range(3):
        state = site.train_from(state, 3)
    assert final_states({"alpha": site}, tmp_path)["alpha"].digest == state.digest


def test_a_slow_and_lossy_network_finishes_with_one_state(tmp_path):
    sites = three_sites()
    network = SimulatedNetwork(seed=5, latency=0.3, loss=0.15)
    summary = run(sites, recipe_of(rounds=8), tmp_path, network)
    assert summary.state_digest is not None
    assert summary.eval_loss < summary.eval_loss_initial / 2


def test_the_same_seed_gives_the_same_run(tmp_path):
    digests = set()
    for folder in (tmp_path / "one", tmp_path / "two"):
        network = SimulatedNetwork(seed=9, latency=0.5, loss=0.3)
        digests.add(run(three_sites(), recipe_of(rounds=6), folder, network).state_digest)
    assert len(digests) == 1


def test_a_partition_heals_and_all_end_with_one_state(tmp_path):
    sites = three_sites()
    network = SimulatedNetwork(seed=1, latency=1.0, partitions=[Partition(100.0, 400.0, frozenset({"gamma"}))])
    summary = run(sites, recipe_of(rounds=40), tmp_path, network)
    assert summary.state_digest is not None
    assert events(tmp_path, "alpha", "peer_down")
    with_gamma = [event for event in events(tmp_path, "alpha", "epoch") if "gamma" in event["contributors"]]
    without = [event for event in events(tmp_path, "alpha", "epoch") if "gamma" not in event["contributors"]]
    assert with_gamma
    assert without
    assert with_gamma[-1]["round"] > without[-1]["round"]


def test_too_few_members_make_a_round_void_and_the_run_goes_on(tmp_path):
    sites = three_sites()
    network = SimulatedNetwork(seed=1, latency=0.1, partitions=[Partition(100.0, 350.0, frozenset({"gamma"}))])
    summary = run(sites, recipe_of(rounds=30, minimum_sites=3, deadline=100.0), tmp_path, network)
    void = events(tmp_path, "alpha", "epoch_void")
    assert (summary.status, summary.rounds, summary.void_rounds) == ("completed", 30, len(void))
    assert 1 <= len(void) <= 2
    assert all(event["contributors"] == [] for event in void)
    assert {event["needed"] for event in events(tmp_path, "alpha", "too_few_members")} == {3}
    counted = events(tmp_path, "alpha", "epoch")
    assert [event["round"] for event in counted] == list(range(1, 31))
    assert all(event["contributors"] == ["alpha", "beta", "gamma"] for event in counted)
    assert np.abs(final_states(sites, tmp_path)["alpha"].buffer - federated_average(sites, 30).buffer).max() <= 1e-5


@pytest.mark.parametrize("mixing", ["group", "metropolis"])
def test_an_interrupted_simulation_goes_on_from_its_commits(tmp_path, mixing):
    whole = run(three_sites(), recipe_of(rounds=6, mixing=mixing), tmp_path / "whole")
    sites = three_sites()

    async def dies(order, ask=sites["beta"].ask):
        if order.fields.get("round") == 4:
            raise PowerCut
        return await ask(order)

    asks = {name: site.ask for name, site in sites.items()}
    with pytest.RaisesGroup(PowerCut):
        simulate_gossip(recipe_of(rounds=6, mixing=mixing), {**asks, "beta": dies}, RunFolder(tmp_path / "cut"))
    resumed = simulate_gossip(recipe_of(rounds=6, mixing=mixing), asks, RunFolder(tmp_path / "cut"))
    one, other = (final_states(sites, tmp_path / name) for name in ("whole", "cut"))
    assert {name: state.digest for name, state in one.items()} == {name: state.digest for name, state in other.items()}
    assert (resumed.state_digest, resumed.tokens_trained) == (whole.state_digest, whole.tokens_trained)


@pytest.mark.parametrize("mixing", ["group", "metropolis"])
@pytest.mark.parametrize(("value", "key"), [(1e15, {}), (50.0, {"max_update_norm": 20.0})])
def test_a_change_that_no_training_makes_is_averaged_by_nobody_and_told_by_name_once(tmp_path, mixing, value, key):
    class Poisoned(LinearSite):
        def train_from(self, state, steps):
            return TrainableState(self.manifest, np.full_like(state.buffer, value))

    sites = {**three_sites(), "mallory": Poisoned(9)}
    recipe = recipe_of(rounds=2, mixing=mixing)
    aggregation = recipe.aggregation.model_copy(update=key)
    run(sites, recipe.model_copy(update={"aggregation": aggregation}), tmp_path)
    states = final_states(sites, tmp_path)
    for name in three_sites():
        assert np.abs(states[name].buffer).max() < 10
        refused = events(tmp_path, name, "refused")
        assert [(event["peer"], event["epoch"]) for event in refused] == [("mallory", 1), ("mallory", 2)]
        assert "the change has norm" in refused[0]["reason"]
