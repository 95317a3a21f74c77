"""Sums in groups of real nodes on a network in memory: what a server would get, bit for bit, and never of too few."""

import asyncio

import numpy as np
import pytest

from core_training.foundation.errors import InputError, ProtocolError, RunError
from core_training.foundation.state import TrainableState
from core_training.runs.run_folder import RunFolder
from p2p.calls import PeerCalls
from p2p.catch_up import CatchUp
from p2p.commits import CommitStore
from p2p.group_averaging import GroupAveraging
from p2p.group_update import GroupUpdate, Proposal
from p2p.matchmaking import Matchmaking, RoundInput
from p2p.messages import GroupHeader
from p2p.opened_sum import OpenedSum
from p2p.plan import RunPlan
from p2p.progress import Progress
from p2p.site_orders import SiteOrders
from p2p.transport import PeerUnreachable
from security.secure_aggregation.group import GroupFault, Phase, RingForm
from simulations.gossip import simulate_gossip
from simulations.network import Partition, SimulatedNetwork, SimulatedTransport
from simulations.virtual_time import run_virtually
from strategies.fedavg import most_weight
from strategies.ring_scale import Scale
from tests.p2p.linear_site import LinearSite, federated_average, recipe_of, ring_average, three_sites
from tests.p2p.test_simulated_gossip import PowerCut, events, final_states, run

MASKED = {"secure_aggregation": True, "clip": 16.0}


def ring_recipe(rounds=5, privacy=MASKED, **options):
    return recipe_of(rounds=rounds, privacy=privacy, learning_rate=1.0, **options)


def final_digests(sites, folder):
    return {state.digest for state in final_states(sites, folder).values()}


@pytest.mark.parametrize("codec", ["ring16", "ring24", "ring32"])
@pytest.mark.parametrize("masked", [True, False])
def test_law_5_a_group_gives_the_bits_of_a_servers_sum_masked_or_not(tmp_path, codec, masked):
    sites, recipe = three_sites(), ring_recipe(privacy={"secure_aggregation": masked, "codec": codec, "clip": 16.0})
    summary = run(sites, recipe, tmp_path)
    assert final_digests(sites, tmp_path) == {summary.state_digest} == {ring_average(sites, 5, recipe).digest}
    assert [event["masked"] for event in events(tmp_path, "alpha", "group_sum")] == [masked] * 5


@pytest.mark.parametrize(("codec", "error"), [("ring16", 0.5), ("ring24", 4e-3), ("ring32", 2e-5)])
def test_law_3_a_group_in_a_ring_is_federated_averaging_but_for_rounding(tmp_path, codec, error):
    sites = three_sites()
    run(sites, ring_recipe(privacy={"codec": codec, "clip": 16.0}), tmp_path)
    state = final_states(sites, tmp_path)["alpha"]
    assert np.abs(state.buffer - federated_average(sites, 5).buffer).max() <= error


def test_values_that_do_not_travel_stay_as_they_were(tmp_path):
    sites, recipe = three_sites(width=400), ring_recipe(rounds=1, privacy={**MASKED, "keep": 0.25})
    run(sites, recipe, tmp_path)
    state = final_states(sites, tmp_path)["beta"]
    assert state.digest == ring_average(sites, 1, recipe).digest
    assert (state.buffer[:33] == sites["beta"].initial().buffer[:33]).mean() > 0.5


@pytest.mark.parametrize("mixing", ["group", "metropolis"])
def test_bf16_sends_half_the_bytes_and_means_the_same(tmp_path, mixing):
    sites = three_sites(width=20_000)
    summary = run(sites, recipe_of(rounds=4, mixing=mixing, privacy={"codec": "bf16"}), tmp_path / "bf16")
    whole = run(sites, recipe_of(rounds=4, mixing=mixing), tmp_path / "fp32")
    assert summary.bytes_up < 0.51 * whole.bytes_up
    halves, wholes = final_states(sites, tmp_path / "bf16"), final_states(sites, tmp_path / "fp32")
    moved = max(np.abs(wholes[name].buffer - sites[name].initial().buffer).max() for name in sites)
    most = 4 * 2**-7 * moved  # in each round a value is rounded to one of its two neighbours with 8 significant bits
    assert max(np.abs(halves[name].buffer - wholes[name].buffer).max() for name in sites) < most
    if mixing == "group":
        assert final_digests(sites, tmp_path / "bf16") == {summary.state_digest}


def test_a_group_sends_two_thirds_of_two_vectors_and_little_else(tmp_path):
    sites = three_sites(width=100_000)
    summary = run(sites, ring_recipe(rounds=1), tmp_path)
    assert summary.bytes_up / 3 <= 2 * (2 / 3) * 2.05 * 100_000


def test_a_slow_and_lossy_network_finishes_with_one_state(tmp_path):
    sites = three_sites()
    summary = run(sites, ring_recipe(rounds=6), tmp_path, SimulatedNetwork(seed=5, latency=0.3, loss=0.1))
    assert final_digests(sites, tmp_path) == {summary.state_digest}
    assert summary.eval_loss < summary.eval_loss_initial


def test_the_states_of_two_sides_of_a_cut_come_together_again(tmp_path):
    sites = three_sites()
    network = SimulatedNetwork(seed=1, latency=0.5, partitions=[Partition(100.0, 300.0, frozenset({"gamma"}))])
    recipe = ring_recipe(rounds=30, privacy={"codec": "ring16", "clip": 16.0}, minimum_sites=2)
    summary = run(sites, recipe, tmp_path, network)
    assert final_digests(sites, tmp_path) == {summary.state_digest}
    contributors = [tuple(event["contributors"]) for event in events(tmp_path, "alpha", "epoch")]
    assert ("alpha", "beta") in contributors
    assert contributors[-1] == ("alpha", "beta", "gamma")


def test_fewer_than_the_minimum_average_nothing_and_the_state_stays(tmp_path):
    sites = three_sites()
    network = SimulatedNetwork(seed=1, latency=0.1, partitions=[Partition(0.0, 1e9, frozenset({"gamma"}))])
    with pytest.raises(RunError, match="3 rounds in a row were void: it takes 3 nodes; missing: gamma"):
        run(sites, ring_recipe(rounds=3, deadline=60.0), tmp_path, network)
    assert final_states(sites, tmp_path)["alpha"].digest == sites["alpha"].initial().digest
    void = {
        name: [event["contributors"] for event in events(tmp_path, name, "epoch_void")] for name in ("alpha", "beta")
    }
    assert max(void.values(), key=len) == [[]] * 3, "who has three first ends the simulation"
    for name in sites:
        assert events(tmp_path, name, "group_formed") == []


def test_a_void_round_is_made_up_for_by_another(tmp_path):
    sites, recipe = three_sites(), ring_recipe(rounds=5, deadline=60.0)
    network = SimulatedNetwork(seed=1, latency=0.1, partitions=[Partition(40.0, 180.0, frozenset({"gamma"}))])
    summary = run(sites, recipe, tmp_path, network)
    void = [event["round"] for event in events(tmp_path, "alpha", "epoch_void")]
    counted = [event["round"] for event in events(tmp_path, "alpha", "epoch")]
    assert len(counted) == 5 == summary.rounds == summary.rounds_done
    assert summary.void_rounds == len(void) > 0
    assert sorted([*counted, *void]) == list(range(1, 6 + len(void)))
    members = [list(sites) if number in counted else [] for number in range(1, max(counted) + 1)]
    assert final_digests(sites, tmp_path) == {ring_average(sites, max(counted), recipe, members).digest}
    assert [event["round"] for event in RunFolder(tmp_path).lines("round_void")] == void
    orders = [number for kind, number, _ in sites["alpha"].orders if kind == "train"]
    assert orders == list(range(1, max(counted) + 1)), "a void round's updates are in no other sum"


def test_an_interrupted_run_goes_on_from_its_commits_to_the_same_bits(tmp_path):
    whole = run(three_sites(), ring_recipe(rounds=6), tmp_path / "whole")
    sites = three_sites()

    async def dies(order, ask=sites["beta"].ask):
        if order.fields.get("round") == 4:
            raise PowerCut
        return await ask(order)

    asks = {name: site.ask for name, site in sites.items()}
    with pytest.RaisesGroup(PowerCut):
        simulate_gossip(ring_recipe(rounds=6), {**asks, "beta": dies}, RunFolder(tmp_path / "cut"))
    resumed = simulate_gossip(ring_recipe(rounds=6), asks, RunFolder(tmp_path / "cut"))
    assert resumed.state_digest == whole.state_digest


class WatchedNetwork(SimulatedNetwork):
    """Looks up what a node has on disk about its sum whenever it opens one."""

    def __init__(self, folder):
        super().__init__(seed=1, latency=0.05)
        self.folder = folder
        self.noted = []

    def transport(self, name):
        return WatchedTransport(self, name)


class WatchedTransport(SimulatedTransport):
    async def exchange(self, peer, header, chunks):
        if header.phase == "open":
            store = CommitStore(self._network.folder / "sites" / self._name / "checkpoints")
            members = OpenedSum(store.opened_file).members(header.round)
            self._network.noted.append((header.round, members))
        return await super().exchange(peer, header, chunks)


def test_a_sum_is_noted_on_disk_before_anything_that_opens_it_leaves(tmp_path):
    """Else a node that is killed then would average with others in the same round, and the two sums would differ."""
    sites, network = three_sites(), WatchedNetwork(tmp_path)
    run(sites, ring_recipe(rounds=2), tmp_path, network)
    assert sorted(network.noted) == [(number, tuple(sites)) for number in (1, 2) for _ in range(3 * 2)]


class LeapingSite(LinearSite):
    def train_from(self, state, steps):
        return TrainableState(state.manifest, state.buffer + np.float32(1.0))

    def __init__(self, seed):
        super().__init__(seed, width=200)


def test_a_scale_that_would_cut_an_update_is_widened_in_the_same_round(tmp_path):
    sites = {name: LeapingSite(seed) for seed, name in enumerate(["alpha", "beta", "gamma"])}
    run(sites, recipe_of(rounds=2, privacy=MASKED), tmp_path)  # its learning rate promises far smaller changes
    failures = events(tmp_path, "alpha", "group_failed")
    assert failures
    assert all("would cut" in event["reason"] for event in failures)
    sums = events(tmp_path, "alpha", "group_sum")
    assert [event["members"] for event in sums] == [list(sites)] * 2
    assert sums[0]["saturated"] == 0


def test_a_node_that_knows_no_scale_follows_the_others(tmp_path):
    """One that lost its commits starts anew, adopts the others' state, and the sums are those of the others' scale."""
    sites = three_sites()
    network = SimulatedNetwork(seed=1, latency=0.1, partitions=[Partition(40.0, 200.0, frozenset({"gamma"}))])
    recipe = ring_recipe(rounds=12, privacy={"codec": "ring16", "clip": 16.0}, minimum_sites=2)
    run(sites, recipe, tmp_path, network)
    everybody, by_round = list(sites), {}
    for event in events(tmp_path, "alpha", "epoch"):
        by_round[event["round"]] = event["contributors"]
    assert everybody in by_round.values()
    assert ["alpha", "beta"] in by_round.values()
    expected = ring_average(sites, 12, recipe, [by_round[number] for number in range(1, 13)])
    assert final_digests(sites, tmp_path) == {expected.digest}


def test_a_recipe_that_the_roster_can_never_fulfil_is_refused_at_once(tmp_path):
    recipe = ring_recipe(privacy={"secure_aggregation": {"minimum_sites": 4}, "clip": 16.0})
    with pytest.raises(InputError, match=r"secure_aggregation.minimum_sites: 4, but the roster has 3"):
        RunPlan("alpha", ("alpha", "beta", "gamma"), "run", recipe, "secret")


ROSTER = ("alpha", "beta", "gamma", "delta")
SCALE = Scale(exponents=[1, 2], weight_cap=64)
FORM = RingForm(8, 2, lambda vector: vector.tobytes(), lambda data: np.frombuffer(data, np.uint16))


def matchmaking(folder, name="alpha"):
    """Alpha's view, or another's, of a secure group of at least three, in round 5."""
    plan = RunPlan(name, ROSTER, "run", ring_recipe(), "secret")
    made = Matchmaking(plan, OpenedSum(folder / "opened.json"), lambda *_, **__: None, lambda: None)
    made.begin(RoundInput(5, b"proposal", FORM))
    return made


def keys(*members, attempt=1, sender="beta", number=5, phase="keys", size=64):
    return GroupHeader(
        run_id="run", sender=sender, round=number, attempt=attempt, members=list(members), phase=phase, size=size,
        sha256="0" * 64,
    )  # fmt: skip


def test_each_node_enforces_the_minimum_of_members_whoever_calls_them_together(tmp_path):
    with pytest.raises(ProtocolError, match="a group of 2; this node takes part from 3 members on"):
        matchmaking(tmp_path).is_current("beta", keys("alpha", "beta"))
    assert matchmaking(tmp_path).is_current("beta", keys("alpha", "beta", "gamma"))


@pytest.mark.parametrize("masked", [True, False])
def test_an_attempt_is_masked_where_the_recipe_says_so(tmp_path, masked):
    recipe = ring_recipe(privacy={"secure_aggregation": masked, "codec": "ring16", "clip": 16.0}, minimum_sites=3)
    plan = RunPlan("alpha", ROSTER, "run", recipe, "secret")
    node = Matchmaking(plan, OpenedSum(tmp_path / "opened.json"), lambda *_, **__: None, lambda: None)
    node.begin(RoundInput(5, b"proposal", FORM))
    assert node.is_current("beta", keys("alpha", "beta", "gamma"))
    message = node.attempt.message_to("beta")
    assert (len(message), message[-8:]) == (2 * 32 * masked + 8, b"proposal")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (keys("beta", "gamma", "delta"), "this node is not of that group"),
        (keys("alpha", "gamma", "delta"), "the sender is not of that group"),
        (keys("alpha", "gamma", "beta"), "not in its order"),
        (keys("alpha", "beta", "stranger"), "not of the roster"),
        (keys("alpha", "beta", "beta", "gamma"), "not in its order"),
        (keys("alpha", "beta", "gamma", size=1 << 30), "bytes in phase 'keys'"),
        (keys(), "not of that group"),
    ],
)
def test_a_call_that_is_not_right_is_refused(tmp_path, header, reason):
    with pytest.raises(ProtocolError, match=reason):
        matchmaking(tmp_path).is_current("beta", header)


@pytest.mark.parametrize("header", [keys(*ROSTER, number=6), keys(*ROSTER, phase="scatter")])
def test_what_comes_too_early_is_asked_for_again(tmp_path, header):
    with pytest.raises(PeerUnreachable):
        matchmaking(tmp_path).is_current("beta", header)


def test_of_two_calls_the_higher_attempt_counts_and_of_equal_ones_that_of_who_stands_first(tmp_path):
    node = matchmaking(tmp_path)
    assert node.is_current("delta", keys("alpha", "gamma", "delta", sender="delta"))
    assert not node.is_current("beta", keys("alpha", "beta", "gamma", attempt=0))
    node = matchmaking(tmp_path)
    assert node.is_current("beta", keys("alpha", "beta", "gamma", attempt=2))
    assert not node.is_current("beta", keys(*ROSTER, attempt=1))
    assert node.attempt.group.attempt == 2


def test_a_caller_that_names_different_members_to_different_nodes_is_left_out(tmp_path):
    node = matchmaking(tmp_path)
    assert node.is_current("gamma", keys("alpha", "beta", "gamma", sender="gamma"))
    assert not node.is_current("beta", keys("alpha", "beta", "delta"))
    assert not node.is_on()


def test_one_that_is_not_in_the_group_cannot_end_its_attempt(tmp_path):
    node = matchmaking(tmp_path)
    assert node.is_current("beta", keys("alpha", "beta", "gamma"))
    with pytest.raises(PeerUnreachable, match="another group"):
        node.is_current("delta", keys("alpha", "gamma", "delta", attempt=2, sender="delta"))
    assert node.is_on()


def test_who_has_opened_a_sum_averages_with_nobody_else_in_that_round_not_even_after_a_restart(tmp_path):
    node = matchmaking(tmp_path)
    assert node.is_current("beta", keys(*ROSTER))
    node.bind(SCALE)
    node.fail("delta", "it is down")
    for restarted in (node, matchmaking(tmp_path)):
        with pytest.raises(ProtocolError, match="opened a sum of other members"):
            restarted.is_current("beta", keys("alpha", "beta", "gamma", attempt=2))
    node = matchmaking(tmp_path)
    assert node.is_current("beta", keys(*ROSTER, attempt=2))
    node.begin(RoundInput(6, b"proposal", FORM))
    assert node.is_current("beta", keys("alpha", "beta", "gamma", number=6))


def test_who_has_opened_a_sum_remembers_its_scale_for_that_round_also_after_a_restart(tmp_path):
    node = matchmaking(tmp_path)
    assert node.is_current("beta", keys(*ROSTER))
    assert node.must_have is None
    node.bind(SCALE)
    assert node.must_have == matchmaking(tmp_path).must_have == SCALE
    node.begin(RoundInput(6, b"proposal", FORM))
    assert node.must_have is None


def test_a_round_before_one_whose_sum_was_opened_has_none_any_more(tmp_path):
    node = matchmaking(tmp_path)
    assert node.is_current("beta", keys(*ROSTER))
    node.bind(SCALE)
    node = matchmaking(tmp_path)
    node.begin(RoundInput(4, b"proposal", FORM))
    with pytest.raises(ProtocolError, match="opened a sum of other members"):
        node.is_current("beta", keys(*ROSTER, number=4))


def test_attempts_at_one_round_end_some_time(tmp_path):
    node = matchmaking(tmp_path)
    for attempt in range(1, 3 * len(ROSTER) + 1):
        assert node.is_current("beta", keys(*ROSTER, attempt=attempt))
    assert not node.may_try_again
    with pytest.raises(ProtocolError, match="12 attempts"):
        node.is_current("beta", keys(*ROSTER, attempt=99))


def test_one_call_cannot_use_up_the_numbers_of_attempts(tmp_path):
    node = matchmaking(tmp_path)
    with pytest.raises(ProtocolError, match="the last one here was 0"):
        node.is_current("beta", keys(*ROSTER, attempt=2**31))
    assert node.is_current("beta", keys(*ROSTER, attempt=12))


def test_who_is_left_out_begins_no_attempt_but_follows_one(tmp_path):
    node = matchmaking(tmp_path)
    assert node.is_current("beta", keys(*ROSTER))
    node.fail("delta", "garbage")
    with pytest.raises(PeerUnreachable, match="'delta' is left out"):
        node.is_current("delta", keys(*ROSTER, attempt=2, sender="delta"))
    assert node.is_current("gamma", keys(*ROSTER, attempt=2, sender="gamma"))
    assert node.is_current("delta", keys(*ROSTER, attempt=2, sender="delta"))


def test_nobody_follows_the_call_of_one_who_is_left_out(tmp_path):
    node = matchmaking(tmp_path, "delta")
    assert node.is_current("beta", keys("beta", "gamma", "delta"))
    node.fail("beta", "garbage")
    with pytest.raises(ProtocolError, match="'beta' called together: garbage"):
        node.is_current("gamma", keys("beta", "gamma", "delta", attempt=2, sender="gamma"))
    assert node.is_current("gamma", keys("alpha", "beta", "gamma", "delta", attempt=2, sender="gamma"))


def test_what_was_said_in_a_group_of_other_members_ends_no_attempt(tmp_path):
    """A message may have begun to come before this attempt did, which has the same number."""
    node = matchmaking(tmp_path)
    assert node.is_current("beta", keys("alpha", "beta", "gamma"))
    told = b'{"member":"gamma","reason":"it is down"}'
    other = keys("alpha", "beta", "delta", phase="gave up", size=len(told))
    node.take("beta", other, told)
    node.refuse("beta", other, "garbage")
    assert node.is_on()
    assert node.left_out == {}


def test_a_member_that_gives_up_leaves_out_nobody_but_members(tmp_path):
    node = matchmaking(tmp_path)
    assert node.is_current("beta", keys("alpha", "beta", "gamma"))
    told = b'{"member":"delta","reason":"it is in no group of ours"}'
    node.take("beta", keys("alpha", "beta", "gamma", phase="gave up", size=len(told)), told)
    assert not node.is_on()
    assert node.left_out == {}


def test_nobody_leaves_out_itself(tmp_path):
    node = matchmaking(tmp_path)
    assert node.is_current("beta", keys("alpha", "beta", "gamma"))
    node.fail("alpha", "it showed different keys")
    assert node.left_out == {}


def test_a_member_that_was_started_again_ends_the_attempt_that_it_has_forgotten(tmp_path):
    node = matchmaking(tmp_path)
    node.heard_here("beta", 5, "first session")
    assert node.is_current("beta", keys(*ROSTER))
    assert node.heard_here("beta", 5, "first session")
    assert node.is_on()
    assert node.heard_here("beta", 5, "second session")
    assert not node.is_on()


def test_a_false_accusation_by_one_who_is_left_out_changes_nothing(tmp_path):
    node = matchmaking(tmp_path)
    assert node.is_current("beta", keys(*ROSTER))
    node.fail("delta", "garbage")
    told = b'{"member":"beta","reason":"it is not"}'
    node.take("delta", keys(*ROSTER, sender="delta", phase="gave up", size=len(told)), told)
    assert set(node.left_out) == {"delta"}
    node.take("gamma", keys(*ROSTER, sender="gamma", phase="gave up", size=len(told)), told)
    assert set(node.left_out) == {"delta", "beta"}


async def alpha(recipe, folder, secret="secret"):
    """One of three nodes, before its first round."""
    site = three_sites()["alpha"]
    plan = RunPlan("alpha", ("alpha", "beta", "gamma"), "run", recipe, secret)
    orders = SiteOrders(plan, site.ask)
    joined = await orders.join()
    return site, orders, Progress(plan, joined, CommitStore(folder), lambda *_, **__: None, site.initial())


class ForeverBusy:
    """A node that always says that it has been in the middle of a round for long, and hands out nothing."""

    async def on_greeting(self, sender, hello):
        told = {"committed": 1, "working": 2, "working_seconds": 50.0, "state_digest": "0" * 64}
        return hello.model_copy(update={"sender": "beta", **told})

    async def on_fetch(self, sender, request):
        raise PeerUnreachable("later")
        yield


async def catch_up_with_beta(folder):
    """For how long alpha, which mixes whole states, sits out."""
    _, _, progress = await alpha(recipe_of(deadline=60.0), folder)
    network = SimulatedNetwork()
    network.attach("beta", ForeverBusy())
    calls = PeerCalls(network.transport("alpha"), progress)
    began = asyncio.get_running_loop().time()
    async with asyncio.timeout(3600):
        assert not await CatchUp(progress, calls).adopt_newest()
    return asyncio.get_running_loop().time() - began


def test_nobody_can_make_a_node_sit_out_for_longer_than_the_deadline(tmp_path):
    assert 60.0 <= run_virtually(catch_up_with_beta(tmp_path)) <= 75.0


LARGEST = 1 << (most_weight(ring_recipe(), 3) - 1).bit_length()


async def write_with(folder, secret="secret", must_have=None, **proposed):
    """Alpha's vector where beta proposes this, and a sum on the scale `must_have` was opened before."""
    site, orders, progress = await alpha(ring_recipe(), folder, secret)
    update = await orders.train(1, None, site.manifest.digest)
    trained = TrainableState.from_bytes(update.payload, site.manifest)
    own = GroupUpdate(progress, update, trained, site.initial())
    alike = {
        "manifest_digest": site.manifest.digest,
        "start_digest": site.initial().digest,
        "scale": Scale(exponents=[0, 0], weight_cap=LARGEST),
    }
    theirs = Proposal(**{**alike, **proposed}).model_dump_json().encode()
    if must_have is not None:
        own.hold(must_have)
    return own.vector({"alpha": own.proposal, "beta": theirs}, must_have)


@pytest.mark.parametrize(
    ("proposed", "reason"),
    [
        ({"manifest_digest": "0" * 64}, "other trainable tensors"),
        ({"start_digest": "0" * 64}, "has trained from another state"),
        ({"scale": Scale(exponents=[0], weight_cap=LARGEST)}, "scale is one of another state"),
        # All changes would be rounded away.
        ({"scale": Scale(exponents=[0, 0], weight_cap=2 * LARGEST)}, "weight_cap"),
    ],
)
def test_a_proposal_that_does_not_fit_is_refused_by_name(tmp_path, proposed, reason):
    asyncio.run(write_with(tmp_path))
    with pytest.raises(GroupFault, match=reason) as caught:
        asyncio.run(write_with(tmp_path, **proposed))
    assert caught.value.member == "beta"


@pytest.mark.parametrize(
    ("scale", "fits"),
    [
        (None, True),
        (SCALE, True),
        (Scale(exponents=[3, 2], weight_cap=8), True),
        (Scale(exponents=[0, 2], weight_cap=64), False),
        (Scale(exponents=[1, 2], weight_cap=128), False),
    ],
)
def test_after_a_sum_was_opened_the_update_is_written_on_its_scale_alone(tmp_path, scale, fits):
    if fits:
        alike = asyncio.run(write_with(tmp_path, scale=SCALE))
        assert np.array_equal(asyncio.run(write_with(tmp_path, must_have=SCALE, scale=scale)), alike)
    else:
        with pytest.raises(GroupFault, match="a wider scale than that of the sum which was opened") as caught:
            asyncio.run(write_with(tmp_path, must_have=SCALE, scale=scale))
        assert caught.value.member == "beta"


def test_one_member_gets_no_second_sum_of_the_same_updates_with_other_weights(tmp_path, monkeypatch):
    """Gamma has all weights cut to 1, keeps the sum to itself and gives up, blaming nobody; then it has none cut. From
    the sums of both, less its own, it would have alpha's update and beta's."""
    caps, sums = [1, 64], []
    start, send, go_on = Matchmaking._start, GroupAveraging._send, GroupAveraging._go_on

    def lying_start(self, group):
        if self._plan.name == "gamma":
            proposal = Proposal.model_validate_json(self._input.proposal)
            scale = Scale(exponents=[0, 0], weight_cap=caps[min(self.attempts, 1)])
            self.propose(proposal.model_copy(update={"scale": scale}).model_dump_json().encode())
        start(self, group)

    def lies(self, attempt):
        return self._plan.name == "gamma" and attempt.group.round == 1 and attempt.phase is Phase.GATHER

    def give_up_with_the_sum(self, attempt, own):
        if not lies(self, attempt):
            return go_on(self, attempt, own)
        sums.append(attempt)
        self._matchmaking.fail(None, "something went wrong")
        return False

    monkeypatch.setattr(Matchmaking, "_start", lying_start)
    monkeypatch.setattr(GroupAveraging, "_send", lambda self, attempt: lies(self, attempt) or send(self, attempt))
    monkeypatch.setattr(GroupAveraging, "_go_on", give_up_with_the_sum)
    summary = run(three_sites(), ring_recipe(rounds=1, minimum_sites=3, deadline=60.0), tmp_path)
    assert len(sums) == 1
    assert (summary.rounds, summary.void_rounds) == (1, 1)
    failed = [(event["member"], event["reason"]) for event in events(tmp_path, "alpha", "group_failed")]
    assert failed[0] == (None, "'gamma' gave up: something went wrong")
    assert failed[1][0] == "gamma"
    assert failed[1][1].endswith("it proposes a wider scale than that of the sum which was opened")


def test_how_a_node_rounds_is_its_own_secret(tmp_path):
    one, again, another = (
        asyncio.run(write_with(tmp_path, secret, scale=SCALE)) for secret in ("one", "one", "another")
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, another)
