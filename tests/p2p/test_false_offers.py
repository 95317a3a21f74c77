"""A member that says of itself what cannot be, or hands out what no training leads to, ends nobody's run."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from core_training.foundation.errors import ProtocolError, VoidRoundsError
from core_training.foundation.state import TrainableState
from core_training.runs.run_folder import RunFolder
from p2p import node as node_module
from p2p.calls import PeerCalls
from p2p.commits import Commit
from p2p.messages import Hello
from p2p.node import GossipNode
from simulations.network import SimulatedNetwork
from strategies.bounds import check_distance
from strategies.messages import MOST_ROUNDS
from tests.p2p.linear_site import LinearSite, recipe_of, three_sites
from tests.p2p.test_group_averaging import alpha
from tests.p2p.test_group_faults import BoastingNetwork
from tests.p2p.test_simulated_gossip import events, final_states, run

GROUP_OF_TWO = {"codec": "ring16", "clip": 16.0}
SITE = LinearSite(7)
SOUND = SITE.train_from(SITE.initial(), 3)
ABSURD = TrainableState(SITE.manifest, np.full(SITE.manifest.size, 1e6, dtype=np.float32))


class Offering(BoastingNetwork):
    """A network on which mallory offers a state in words of its own choice."""

    def __init__(self, state, **told):
        super().__init__("mallory", state, None)
        self.told = told

    def boast(self, hello):
        ahead = {"committed": hello.committed + 1, "contributors": ["x"] * 9, "state_digest": self.state.digest}
        return hello.model_copy(update={**ahead, **self.told})


@pytest.fixture
def sites():
    return {**three_sites(), "mallory": LinearSite(9)}


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"committed": 10**9}, "the recipe has 3 rounds"),
        ({"committed": MOST_ROUNDS}, "the recipe has 3 rounds"),
        ({"committed": 4}, "the recipe has 3 rounds"),
        ({"committed": MOST_ROUNDS, "void_rounds": MOST_ROUNDS}, "ends at 6"),
        ({"committed": 6, "void_rounds": 6}, "ends at 6"),
        ({"committed": 3, "state_digest": ""}, "state: StateRequest: state_digest"),
    ],
)
@pytest.mark.parametrize(("mixing", "privacy"), [("group", {}), ("metropolis", {"codec": "bf16"})])
def test_an_offer_that_cannot_be_is_refused_by_name_and_the_run_goes_on(tmp_path, sites, mixing, privacy, told, reason):
    run(sites, recipe_of(rounds=3, mixing=mixing, privacy=privacy), tmp_path, Offering(SOUND, **told))
    for name in three_sites():
        assert [event["epoch"] for event in events(tmp_path, name, "epoch")] == [1, 2, 3]
        assert events(tmp_path, name, "adopted") == []
        refused = [event["reason"] for event in events(tmp_path, name, "refused") if event["peer"] == "mallory"]
        assert reason in refused[0]


def test_an_offer_that_cannot_be_is_told_once(tmp_path, sites):
    run(sites, recipe_of(rounds=3), tmp_path, Offering(SOUND, committed=5))
    assert len(events(tmp_path, "alpha", "refused")) == 1


@pytest.mark.parametrize("mixing", ["group", "metropolis"])
def test_a_state_that_no_training_leads_to_is_not_adopted(tmp_path, sites, mixing):
    run(sites, recipe_of(rounds=2, mixing=mixing), tmp_path, Offering(ABSURD))
    states = final_states(sites, tmp_path)
    for name in three_sites():
        assert events(tmp_path, name, "adopted") == []
        assert np.abs(states[name].buffer).max() < 10
        assert "from the run's first state" in events(tmp_path, name, "refused")[0]["reason"]


@pytest.mark.parametrize("privacy", [{}, GROUP_OF_TWO])
def test_a_state_may_be_as_far_off_as_its_rounds_can_lead(privacy):
    recipe, initial = recipe_of(privacy=privacy), SITE.initial()
    if not privacy:
        recipe = recipe.model_copy(
            update={"aggregation": recipe.aggregation.model_copy(update={"max_update_norm": 16.0 * 7**0.5})}
        )
    off = TrainableState(SITE.manifest, initial.buffer + np.float32(47.0))  # three rounds lead 48
    check_distance(recipe, 3, off, initial)
    with pytest.raises(ProtocolError, match="2 rounds lead"):
        check_distance(recipe, 2, off, initial)
    with pytest.raises(ProtocolError, match="NaN or infinite"):
        check_distance(recipe, 3, TrainableState(SITE.manifest, initial.buffer * np.float32(np.nan)), initial)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"committed": MOST_ROUNDS + 1, "state_digest": "0" * 64}, "committed"),
        ({"working": MOST_ROUNDS + 1}, "working"),
        ({"committed": 5, "state_digest": ""}, "a digest of its state"),
        ({"committed": 0, "state_digest": "0" * 64}, "a digest of its state"),
        ({"committed": 5, "state_digest": "0" * 64, "void_rounds": 6}, "6 void rounds of 5"),
    ],
)
def test_a_greeting_that_contradicts_itself_is_refused(tmp_path, told, reason):
    async def greeting():
        _, _, progress = await alpha(recipe_of(), tmp_path)
        return progress.hello().model_dump()

    fields = asyncio.run(greeting())
    Hello.read(fields)
    with pytest.raises(ProtocolError, match=reason):
        Hello.read({**fields, **told})


@pytest.mark.parametrize(("by_the_way", "seen", "ends"), [(6, 1, False), (1, 6, False), (6, 6, True)])
def test_void_rounds_end_a_node_that_has_seen_them_itself(tmp_path, by_the_way, seen, ends):
    async def node():
        _, orders, progress = await alpha(recipe_of(rounds=4, privacy=GROUP_OF_TWO), tmp_path / "checkpoints")
        progress.ledger.void_rounds = seen
        progress.put(Commit(6, SOUND, {}, ("beta",), replace(progress.ledger), void_rounds=by_the_way))
        calls = PeerCalls(SimulatedNetwork().transport("alpha"), progress)
        return GossipNode(progress, calls, orders, RunFolder(tmp_path), 0.0)

    made = asyncio.run(node())
    if ends:
        with pytest.raises(VoidRoundsError, match="6 rounds were void"):
            made._check_void_rounds()
    else:
        made._check_void_rounds()


def test_each_update_is_looked_at_once(tmp_path, monkeypatch):
    looked_at = []

    def check(recipe, steps, trained, start):
        looked_at.append(trained.digest)

    monkeypatch.setattr(node_module, "check_change", check)
    run(three_sites(), recipe_of(rounds=3), tmp_path, SimulatedNetwork(seed=1, latency=2.0))
    assert len(looked_at) == 3 * 3 * 2  # rounds × nodes × peers
