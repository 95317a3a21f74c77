"""A member of a secure group that fails or lies, at each phase: the others agree on one state, and nobody hangs."""

import asyncio
import hashlib
import os
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product

import pytest

from core_training.foundation.errors import VoidRoundsError
from core_training.runs.run_folder import RunFolder
from p2p.transport import PeerUnreachable
from security.secure_aggregation.group import Phase
from simulations.gossip import simulate_gossip
from simulations.network import SimulatedNetwork, SimulatedTransport
from tests.p2p.linear_site import LinearSite, recipe_of, ring_average
from tests.p2p.test_simulated_gossip import events, final_states

pytestmark = pytest.mark.slow  # they wait for deadlines
BEFORE_OPENING = ("keys", "scatter", "ready")
FAULTS = ("crash", "hang", "garbage", "duplicate", "stale", "split view")
LIES = ("garbage", "split view", "wrong key")
PRIVACY = {"secure_aggregation": {"minimum_sites": 3}, "clip": 16.0}


@dataclass
class Fault:
    """What the culprit does in the first round, from a phase on (crash, hang) or in it."""

    kind: str
    phase: str
    culprit: str
    struck: bool = False

    def strikes(self, header):
        if header.round > 1 or header.phase in ("here", "gave up"):
            return False
        phases = [phase.value for phase in Phase]
        due = phases.index(header.phase) - phases.index(self.phase)
        return due >= 0 if self.kind in ("crash", "hang") else due == 0

    def false(self, payload):
        """Other bytes of the same form."""
        if self.phase == "keys":
            return os.urandom(32) + (payload[32:] if self.kind == "wrong key" else os.urandom(32) + payload[64:])
        return os.urandom(len(payload) or 1)


class FaultyNetwork(SimulatedNetwork):
    def __init__(self, fault):
        super().__init__(seed=1, latency=0.05)
        self.fault = fault

    def transport(self, name):
        return FaultyTransport(self, name) if name == self.fault.culprit else super().transport(name)


class FaultyTransport(SimulatedTransport):
    """The calling side of the culprit."""

    async def exchange(self, peer, header, chunks):
        fault = self._network.fault
        if header.phase == "gave up" and fault.kind in LIES:
            await asyncio.Event().wait()  # whoever lies does not tell the others what it found out by it
        if not fault.strikes(header):
            return await super().exchange(peer, header, chunks)
        fault.struck = True
        payload = b"".join(chunks)
        if fault.kind == "dribble":
            handler = await self._network.deliver(self._name, peer)
            return await handler.on_group_message(self._name, header, dribbled(payload))
        if fault.kind == "crash":
            self._network.crash(self._name)
            raise PeerUnreachable("dead")
        if fault.kind == "hang":
            await asyncio.Event().wait()
        if fault.kind == "stale":
            await super().exchange(peer, header.model_copy(update={"attempt": header.attempt - 1}), [payload])
        if fault.kind == "duplicate":
            await super().exchange(peer, header, [payload])
        first = next(name for name in header.members if name != self._name)
        if fault.kind in LIES and (fault.kind != "split view" or peer == first):
            payload = fault.false(payload)
            header = header.model_copy(update={"size": len(payload), "sha256": hashlib.sha256(payload).hexdigest()})
        return await super().exchange(peer, header, [payload])


async def dribbled(payload):
    """One byte, and nothing, every five seconds: always a sign of life."""
    for value in payload:
        await asyncio.sleep(2.5)
        yield b""
        await asyncio.sleep(2.5)
        yield bytes([value])


def sites_of(count):
    return {f"site{n}": LinearSite(n, examples=5 + 3 * n, shift=n - 2.0) for n in range(count)}


class Outcome:
    """A run of two rounds in which the culprit fails in the first."""

    def __init__(self, folder, count, fault):
        self.sites = sites_of(count)
        self.recipe = recipe_of(rounds=2, privacy=PRIVACY, learning_rate=1.0, deadline=120.0)
        asks = {name: site.ask for name, site in self.sites.items()}
        try:
            simulate_gossip(self.recipe, asks, RunFolder(folder), FaultyNetwork(fault))
        except VoidRoundsError:
            assert count == 3, "enough are left, and they end for void rounds"
        assert fault.struck
        self.states = final_states(self.sites, folder)
        self.survivors = [name for name in self.sites if name != fault.culprit]
        heard = self.survivors if fault.kind == "crash" else list(self.sites)
        self.rounds = {name: [*events(folder, name, "epoch")] for name in heard}
        self.blamed = {event["member"] for name in self.survivors for event in events(folder, name, "group_failed")} - {
            None
        }

    def members(self, number):
        """Whose updates went into the state after a round, at most; none where it was void."""
        found = [event["contributors"] for own in self.rounds.values() for event in own if event["round"] == number]
        return max(found, key=len, default=[])

    def check_the_state(self):
        """All survivors hold one state: a server's, by its arithmetic on just the updates of the groups that were."""
        (digest,) = {self.states[name].digest for name in self.survivors}
        last = max((event["round"] for name in self.survivors for event in self.rounds[name]), default=0)
        groups = product(*({(), tuple(self.members(number))} for number in range(1, last + 1)))
        assert digest in {ring_average(self.sites, last, self.recipe, members).digest for members in groups}


PHASES = [phase.value for phase in Phase]
COUNTS = (3, 5, 8)
SAMPLE = [
    (kind, phase, COUNTS[(row + column) % len(COUNTS)])
    for row, kind in enumerate(FAULTS)
    for column, phase in enumerate(PHASES)
]
"""Each kind of fault in each phase, once; and both with each size of a group."""


def test_every_two_of_kind_phase_and_size_meet_in_the_sample():
    for first, second, many in ((0, 1, len(FAULTS) * len(PHASES)), (0, 2, len(FAULTS) * 3), (1, 2, len(PHASES) * 3)):
        assert len({(one[first], one[second]) for one in SAMPLE}) == many


@pytest.mark.parametrize(("kind", "phase", "count"), SAMPLE)
def test_survivors_agree_on_the_exact_mean_of_a_group_or_on_none(tmp_path, kind, phase, count):
    everybody = [f"site{n}" for n in range(count)]
    outcome = Outcome(tmp_path, count, Fault(kind, phase, f"site{count // 2}"))
    outcome.check_the_state()
    if kind in ("duplicate", "stale"):
        assert outcome.members(1) == outcome.members(2) == everybody
        assert not outcome.blamed
    elif count == 3 and phase != "confirm":
        assert outcome.members(1) == []
    elif kind != "split view" and phase in BEFORE_OPENING:
        assert outcome.members(1) == outcome.survivors
    if kind == "crash" and count > 3:
        assert outcome.members(2) == outcome.survivors


@pytest.mark.parametrize("count", [3, 5, 8])
def test_a_member_without_the_key_that_it_showed_is_left_out(tmp_path, count):
    outcome = Outcome(tmp_path, count, Fault("wrong key", "keys", "site1"))
    outcome.check_the_state()
    assert outcome.members(1) == (outcome.survivors if count > 3 else [])
    assert outcome.blamed == {"site1"}


@pytest.mark.parametrize("kind", ["crash", "hang", "garbage"])
@pytest.mark.parametrize("phase", ["keys", "scatter"])
def test_another_calls_the_group_together_when_the_first_member_fails(tmp_path, kind, phase):
    outcome = Outcome(tmp_path, 5, Fault(kind, phase, "site0"))
    outcome.check_the_state()
    assert outcome.members(1) == outcome.survivors


def test_a_member_that_dribbles_is_left_out_in_the_same_round(tmp_path):
    outcome = Outcome(tmp_path, 5, Fault("dribble", "scatter", "site2"))
    outcome.check_the_state()
    assert outcome.members(1) == outcome.survivors
    assert outcome.members(2) == list(outcome.sites)


class ConfirmsLost(SimulatedNetwork):
    """In the second round nothing that confirms its sum reaches some of the nodes."""

    def __init__(self, deaf):
        super().__init__(seed=1, latency=0.05)
        self.deaf = deaf

    def transport(self, name):
        return LosingTransport(self, name)


class LosingTransport(SimulatedTransport):
    async def exchange(self, peer, header, chunks):
        if (header.round, header.phase) == (2, "confirm") and peer in self._network.deaf:
            raise PeerUnreachable("lost")
        return await super().exchange(peer, header, chunks)


@pytest.mark.parametrize(("count", "deaf"), [(3, {"site2"}), (5, {"site3", "site4"})])
def test_all_take_part_again_after_some_missed_the_end_of_a_sum_though_all_are_needed(tmp_path, count, deaf):
    sites, privacy = sites_of(count), {"secure_aggregation": {"minimum_sites": count}, "clip": 16.0}
    recipe = recipe_of(rounds=4, privacy=privacy, learning_rate=1.0, deadline=120.0)
    simulate_gossip(recipe, {name: site.ask for name, site in sites.items()}, RunFolder(tmp_path), ConfirmsLost(deaf))
    states = final_states(sites, tmp_path)
    assert {state.digest for state in states.values()} == {ring_average(sites, 4, recipe).digest}
    assert [len(events(tmp_path, name, "adopted")) for name in sites] == [name in deaf for name in sites]


class BoastingNetwork(SimulatedNetwork):
    """One node says of itself that it is a round ahead, and hands out a state of its own making.

    It confirms to all but `first` so late that this one has a new state before the others.
    """

    def __init__(self, culprit, state, first):
        super().__init__(seed=1, latency=0.05)
        self.culprit, self.state, self.first = culprit, state, first

    def boast(self, hello):
        offered = {"committed": hello.committed + 1, "contributors": ["x"] * 99, "state_digest": self.state.digest}
        return hello.model_copy(update=offered)

    def attach(self, name, handler):
        super().attach(name, BoastingHandler(self, handler) if name == self.culprit else handler)

    def transport(self, name):
        return BoastingTransport(self, name) if name == self.culprit else super().transport(name)


class BoastingTransport(SimulatedTransport):
    async def greet(self, peer, hello):
        return await super().greet(peer, self._network.boast(hello))

    async def exchange(self, peer, header, chunks):
        if header.phase == "confirm" and self._network.first not in (None, peer):
            await asyncio.sleep(4)
        return await super().exchange(peer, header, chunks)


class BoastingHandler:
    def __init__(self, network, handler):
        self.network, self.handler = network, handler

    def __getattr__(self, name):
        return getattr(self.handler, name)

    async def on_greeting(self, sender, hello):
        return self.network.boast(await self.handler.on_greeting(sender, hello))

    async def on_fetch(self, sender, request):
        yield self.network.state.to_bytes()


@pytest.mark.parametrize(("count", "first"), [(5, None), (3, "site0"), (5, "site0")])
def test_one_node_cannot_put_a_state_of_its_making_in_the_place_of_the_groups(tmp_path, count, first):
    sites, recipe = sites_of(count), recipe_of(rounds=3, privacy=PRIVACY, learning_rate=1.0)
    *honest, liar = sites
    crafted = sites["site0"].train_from(sites["site0"].initial(), 50)
    asks = {name: site.ask for name, site in sites.items()}
    void = nullcontext() if len(honest) >= 3 else pytest.raises(VoidRoundsError, match="3 rounds in a row")
    with void:  # two find no third that is where they are
        simulate_gossip(recipe, asks, RunFolder(tmp_path), BoastingNetwork(liar, crafted, first))
    states = final_states(sites, tmp_path)
    assert crafted.digest not in {states[name].digest for name in honest}
    assert [event for name in honest for event in events(tmp_path, name, "adopted")] == []
    sums = {event["round"]: event["contributors"] for event in events(tmp_path, "site0", "epoch")}
    assert len(sums) == (3 if len(honest) >= 3 else 0)
    members = [sums.get(number, ()) for number in (1, 2, 3)]
    assert {states[name].digest for name in honest} == {ring_average(sites, 3, recipe, members).digest}
