"""Any order, loss, doubling, delay and corruption of messages, and restarts of sites at any moment: the exact sum of
the survivors, or none; no slot, round or mask used twice; no vector that leaves unmasked."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from core_training.foundation.errors import ProtocolError
from security.secure_aggregation.server import ServerBatch, ServerRound
from security.secure_aggregation.terms import Terms
from tests.security.secure_aggregation.federation import RUN, Federation

SLOTS = 2
FAULTS = ["lost", "doubled", "late", "corrupt", "cut", "killed before", "killed after"]


@dataclass(eq=False)
class InFlight:
    """A message on its way: an order to a site, or the answer to one, with what the server will do with it."""

    site: str
    step: str
    order: bytes | None = None
    answer: bytes | None = None
    vector: np.ndarray | None = None
    round: int = 0
    receiver: ServerBatch | ServerRound | None = None


class LossyFederation(RuleBasedStateMachine):
    """Five sites, three of which open a sum, and a server that goes on with whoever answers."""

    @initialize(seed=st.integers(0, 3))
    def begin(self, seed):
        self.federation = Federation(5, Terms(3, 3, 16, 1.0), seed=seed)
        self.disk = {name: json.dumps(site.record) for name, site in self.federation.sites.items()}
        self.wire: list[InFlight] = []
        self.batches = 0
        self.batch: ServerBatch | None = None
        self.open: ServerRound | None = None
        self.slot = 0
        self.round = 0
        self.stage = "batch"
        self.vectors: dict[int, dict[str, np.ndarray]] = {}
        self.left: dict[tuple[str, int], set[bytes]] = {}  # what left a site for a round
        self.masks: dict[bytes, tuple[str, int]] = {}  # which site and round a mask served

    @rule(
        random=st.randoms(use_true_random=False),
        faults=st.sampled_from([0.05, 0.1, 0.0, 0.3]),
        exchanges=st.integers(3, 12),
    )
    def the_run_goes_on(self, random, faults, exchanges):
        """The server asks; the orders, and then the answers, are on their way, with what was late before."""
        for _ in range(exchanges):
            self.server_goes_on()
            self.network_delivers(random, faults)
            self.network_delivers(random, faults)

    def server_goes_on(self):
        """The server does not wait for whoever has not answered by now."""
        stage, self.stage = self.stage, "batch"
        try:
            if stage == "batch":
                self.batch = ServerBatch(RUN, self.batches, SLOTS, self.federation.roster, self.federation.terms)
                self.batches, self.slot = self.batches + 1, 0
                for name in self.federation.names:
                    self.wire.append(InFlight(name, "keys", self.batch.keys_order(), receiver=self.batch))
                self.stage = "shares"
            elif stage == "shares":
                for name, order in self.batch.shares_orders().items():
                    self.wire.append(InFlight(name, "shares", order, receiver=self.batch))
                self.stage = "mask"
            elif stage == "mask" and self.slot < SLOTS:
                self.round, slot, self.slot, self.stage = self.round + 1, self.slot, self.slot + 1, "mask"
                context = self.context(self.round)
                self.open = ServerRound(self.batch, slot, self.round, context, 8, self.federation.names)
                self.vectors[self.round] = self.federation.vectors(seed=self.round)
                for name in self.open.participants:
                    order = self.open.mask_order(name).encode()
                    self.wire.append(InFlight(name, "mask", order, round=self.round, receiver=self.open))
                self.stage = "unmask"
            elif stage == "unmask":
                self.stage = "mask"
                for name, order in self.open.unmask_orders().items():
                    self.wire.append(InFlight(name, "unmask", order, receiver=self.open))
                self.stage = "finish"
            elif stage == "finish":
                self.stage = "mask"
                total = self.open.finish()
                wanted = self.federation.plain_sum(self.vectors[self.round], self.open.survivors)
                assert total.tolist() == wanted.tolist()
                assert len(self.open.survivors) >= 3
        except ProtocolError:
            pass

    def network_delivers(self, random, faults: float) -> None:
        """What is on its way arrives, in any order, and most of it undamaged."""
        arriving, self.wire = self.wire, []
        random.shuffle(arriving)
        for message in arriving:
            fault = random.choice(FAULTS) if random.random() < faults else "none"
            if fault == "late":
                self.wire.append(message)
            elif fault != "lost":
                if fault in ("corrupt", "cut"):
                    message = self.damaged(message, fault, random)
                for _ in range(2 if fault == "doubled" else 1):
                    self.arrives(message, fault)

    @rule(name=st.sampled_from([f"site-{number:02d}" for number in range(5)]))
    def site_is_restarted(self, name):
        self.federation.sites[name] = self.federation.new_site(name, json.loads(self.disk[name]))

    @invariant()
    def nothing_left_twice_or_unmasked(self):
        for (name, number), sent in getattr(self, "left", {}).items():
            assert len(sent) == 1
            assert self.vectors[number][name].tobytes() not in sent

    def arrives(self, message: InFlight, fault: str) -> None:
        try:
            if message.order is not None:
                self.site_answers(message, fault)
            elif message.step == "mask":
                message.receiver.add(message.site, message.answer.decode(errors="replace"), message.vector)
            else:
                take = {"keys": "add_keys", "shares": "add_shares", "unmask": "add_unmasked"}[message.step]
                getattr(message.receiver, take)(message.site, message.answer)
        except ProtocolError:
            pass

    def site_answers(self, message: InFlight, fault: str) -> None:
        name, site, vector = message.site, self.federation.sites[message.site], None
        if message.step == "mask":
            vector = self.vectors[message.round][name].copy()
            order = message.order.decode(errors="replace")
            answer = site.mask(message.round, order, self.context(message.round), vector).encode()
        else:
            answer = site.answer(message.step, message.order)
        if fault == "killed before":  # its record is not on disk, and nothing of the answer left
            self.site_is_restarted(name)
            return
        self.disk[name] = json.dumps(site.record)
        if fault == "killed after":
            self.site_is_restarted(name)
        if vector is not None:
            self.left.setdefault((name, message.round), set()).add(vector.tobytes())
            mask = (vector - self.vectors[message.round][name]).tobytes()
            assert self.masks.setdefault(mask, (name, message.round)) == (name, message.round)
        self.wire.append(InFlight(name, message.step, None, answer, vector, message.round, message.receiver))

    def damaged(self, message: InFlight, fault: str, random) -> InFlight:
        if message.vector is not None and fault == "corrupt" and random.random() < 0.5:
            vector = message.vector.copy()
            vector[random.randrange(len(vector))] ^= np.uint16(1 << random.randrange(16))
            return replace(message, vector=vector)
        field = "answer" if message.order is None else "order"
        raw = bytearray(getattr(message, field))
        place = random.randrange(len(raw))
        raw[place] ^= random.randrange(1, 256)
        return replace(message, **{field: bytes(raw if fault == "corrupt" else raw[:place])})

    def context(self, number: int) -> bytes:
        return number.to_bytes(32)


TestLossyFederation = pytest.mark.no_cover(LossyFederation.TestCase)
TestLossyFederation.settings = settings(
    max_examples=100, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck)
)
