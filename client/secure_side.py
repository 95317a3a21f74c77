"""A site's side of secure aggregation in one run: the protocol, and its record on disk before a byte leaves.

The record holds the secrets of the masks that are still to be used, so only its owner may read it. Beside it lies the
roster that the run's masks began with: a site that pins another one while a run is under way goes on with this one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from client.enrolment import Enrolment
from core_training.foundation.bounded_reading import MOST_JSON_BYTES, parse_json
from core_training.foundation.durable import commit_file
from core_training.foundation.errors import InputError, ProtocolError
from core_training.recipe.schema import Recipe
from security.identities import roster_digest
from security.private_files import read_private_file, replace_private_file
from security.secure_aggregation.masks import RingVector
from security.secure_aggregation.site import SiteProtocol
from security.secure_aggregation.terms import terms_of
from strategies.messages import SecureOrder, SecureReply, masks_of_evaluation
from strategies.ring_scale import largest_change


class SecureSide:
    """The protocol of one run at one site, kept in `file`."""

    def __init__(
        self, name: str, enrolment: Enrolment, recipe: Recipe, run_id: str, file: Path, evaluation: str | None = None
    ) -> None:
        """`evaluation` is the key of the one whose sums are masked; None: the run's own rounds.

        Raise InputError when the site lacks what it takes, or demands more than the recipe offers.
        """
        self._name = name
        self._identity = enrolment.identity
        self._minimums = enrolment.minimums
        self._terms = terms_of(recipe, largest_change(recipe))
        self._run_id = run_id
        self._masks_of = run_id if evaluation is None else masks_of_evaluation(run_id, evaluation)
        self._file = file
        self._result = file.with_name("result.sha256")
        kept = self._load()
        self._roster = kept["roster"] if kept else dict(enrolment.roster)
        if name not in self._roster or self._identity is None:
            raise InputError(
                f"site '{name}' has pinned no roster that names it, which secure aggregation needs: get roster.json "
                "from the server's operator (`fedloom server roster`), then at the site `fedloom client pin "
                "roster.json`, and stop and start it"
            )
        self.roster_digest = roster_digest(self._roster)
        self.most_sites = len(self._roster)
        """No sum of this run has more sites in it."""
        # Made for its checks alone: what it refuses is refused when the site joins, not in a round.
        self._protocol(kept)

    def answer(self, order: SecureOrder) -> SecureReply:
        """Answer a step besides training. Raises ProtocolError for a step that no honest server asks."""
        with self._recorded() as protocol:
            answer = protocol.answer(order.step, bytes(order.payload))
        return SecureReply(run_id=self._run_id, payload=answer)

    def mask(self, round_number: int, order: str, context: bytes, vector: RingVector) -> str:
        """Mask the vector in place; returns the signed statement that goes with it."""
        with self._recorded() as protocol:
            return protocol.mask(round_number, order, context, vector)

    def admit_evaluation(self, state_digest: str, *, final: bool) -> None:
        """Raise ProtocolError unless this is the run's one result. From then on nothing is masked in this run.

        An evaluation is told in the clear: a server that could have any state evaluated could ask about single records.
        """
        if not final:
            raise ProtocolError("this run aggregates securely: a site's own loss is told of the result alone")
        if self._result.exists() and self._result.read_text(encoding="ascii") != state_digest:
            raise ProtocolError("this run aggregates securely, and another state was evaluated as its result before")
        # Noted before the secrets go: a kill in between must not leave the run open to more masking.
        commit_file(self._result, state_digest.encode())
        protocol = self._protocol(self._load())
        protocol.erase()
        self._save(protocol)

    @contextmanager
    def _recorded(self) -> Iterator[SiteProtocol]:
        """The protocol as the record has it, which is on disk again when the block ends.

        It is read anew each time: on Ray, one order of a round may be answered in one process and the next in another.
        """
        if self._result.exists():
            raise ProtocolError("the result of this run was evaluated here: nothing more is masked in it")
        protocol = self._protocol(self._load())
        # An exception skips the save: an order that was refused leaves the record as it was.
        yield protocol
        self._save(protocol)

    def _protocol(self, kept: dict[str, Any] | None) -> SiteProtocol:
        assert self._identity is not None, "a site without a key takes no part"
        record = kept["protocol"] if kept else None
        return SiteProtocol(
            self._name, self._identity, self._roster, self._terms, self._minimums, self._masks_of, record=record
        )

    def _load(self) -> dict[str, Any] | None:
        if not self._file.exists():
            return None
        kept: dict[str, Any] = parse_json(read_private_file(self._file, MOST_JSON_BYTES))
        return kept

    def _save(self, protocol: SiteProtocol) -> None:
        kept = {"roster": self._roster, "protocol": protocol.record}
        replace_private_file(self._file, json.dumps(kept).encode())
