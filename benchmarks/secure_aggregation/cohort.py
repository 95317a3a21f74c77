"""Sites and a server that aggregate securely, all in this process; counts each site's seconds and bytes as they go.

Only the protocol and the codec are here: no training, no disk, no network. Bytes are those of the messages that
fedloom sends, as Flower writes them, payload and all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity

from flower_transport.records import to_messages
from security.secure_aggregation.server import ServerBatch, ServerRound
from security.secure_aggregation.site import SiteProtocol
from security.secure_aggregation.terms import Minimums, Terms
from security.signing import public_key_text
from strategies.messages import Envelope, MaskedUpdate, SecureOrder, SecureReply
from strategies.ring import RingCodec, RingVector

RUN = "benchmark"
CONTEXT = bytes(32)

_Result = TypeVar("_Result")


@dataclass
class Spent:
    """What the protocol took of one site so far."""

    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0


class Cohort:
    """`count` sites and one batch of `slots` rounds among them, set up."""

    def __init__(self, count: int, slots: int = 1, ring_bits: int = 16) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        keys = {f"site-{number:04d}": Ed25519PrivateKey.generate() for number in range(1, count + 1)}
        roster = {name: public_key_text(key) for name, key in keys.items()}
        terms = Terms(threshold=None, minimum_sites=3, ring_bits=ring_bits, clip=1.0)
        self.sites = {name: SiteProtocol(name, key, roster, terms, Minimums(), RUN) for name, key in keys.items()}
        self.spent = {name: Spent() for name in keys}
        self._batch = ServerBatch(RUN, 1, slots, roster, terms)
        order = self._batch.keys_order()
        for name in keys:
            self._batch.add_keys(name, self._ask(name, "keys", order))
        for name, order in self._batch.shares_orders().items():
            self._batch.add_shares(name, self._ask(name, "shares", order))

    def begin(self, number: int, codec: RingCodec) -> ServerRound:
        """Round `number`, from 1, in the slot of that number."""
        return ServerRound(self._batch, number - 1, number, CONTEXT, codec.length, list(self.sites))

    def mask(self, round_: ServerRound, number: int, name: str, codec: RingCodec, vector: RingVector) -> None:
        """Mask the vector of a site, in place, and let the server add what travels."""
        order = round_.mask_order(name)

        def masked() -> tuple[str, bytes | memoryview]:
            return self.sites[name].mask(number, order, CONTEXT, vector), codec.view(vector)

        statement, payload = self._timed(name, masked)
        self.spent[name].bytes_down += len(order)
        self.spent[name].bytes_up += sent_bytes(masked_update(number, statement, payload))
        round_.add(name, statement, codec.from_bytes(payload))

    def unmask(self, round_: ServerRound, silent: Collection[str] = ()) -> tuple[RingVector, float]:
        """The sum, and the seconds that the server needed for it beside the sites' answers; `silent` give none."""
        began = time.perf_counter()
        orders = round_.unmask_orders()
        seconds = time.perf_counter() - began
        answers = {name: self._ask(name, "unmask", order) for name, order in orders.items() if name not in silent}
        began = time.perf_counter()
        for name, answer in answers.items():
            round_.add_unmasked(name, answer)
        total = round_.finish()
        return total, seconds + time.perf_counter() - began

    def _ask(self, name: str, step: Any, order: bytes) -> bytes:
        answer = self._timed(name, lambda: self.sites[name].answer(step, order))
        self.spent[name].bytes_down += sent_bytes(SecureOrder(run_id=RUN, step=step, payload=order).envelope())
        self.spent[name].bytes_up += sent_bytes(SecureReply(run_id=RUN, payload=answer).envelope())
        return answer

    def _timed(self, name: str, work: Callable[[], _Result]) -> _Result:
        """The site's work, and the writing of its record, which is to be on disk before anything leaves."""
        began = time.perf_counter()
        result = work()
        json.dumps(self.sites[name].record)
        self.spent[name].seconds += time.perf_counter() - began
        return result


def sent_bytes(envelope: Envelope) -> int:
    """What Flower's wire carries for a message: its records, chunks and their descriptions."""
    (message,) = to_messages({1: envelope})
    return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())


def masked_update(number: int, statement: str, payload: bytes | memoryview) -> Envelope:
    """The message that a masked vector travels in."""
    return MaskedUpdate(
        run_id=RUN,
        round=number,
        manifest_digest="0" * 64,
        statement=statement,
        resident_seconds=0.123456,
        training_seconds=12.3456,
        masking_seconds=0.123456,
        seconds=12.3456,
        payload=payload,
    ).envelope()
