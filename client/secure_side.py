"""A site's side of secure aggregation in one run: the protocol, and its record on disk before a byte leaves.

The record holds the secrets of the masks that are still to be used, so only its owner may read it. Beside it lies the
roster that the run's masks began with: a site that pins another one while a run is under way goes on with this one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from client.enrolment import Enrolment
from core_training.durable import commit_file
from core_training.errors import InputError, ProtocolError
from core_training.recipe import Recipe
from security.identities import roster_digest
from security.private_files import read_private_file, replace_private_file
from security.secure_aggregation.masks import RingVector
from security.secure_aggregation.site import SiteProtocol
from security.secure_aggregation.terms import terms_of
from strategies.exchange import SecureOrder, SecureReply
from strategies.ring_scale import largest_change


class SecureSide:
    """The protocol of one run at one site, kept in `file`."""

    def __init__(self, name: str, enrolment: Enrolment, recipe: Recipe, run_id: str, file: Path) -> None:
        """Raises InputError when the site lacks what it takes, or demands more than the recipe offers."""
        self._run_id = run_id
        self._file = file
        kept = self._load()
        self._roster = kept["roster"] if kept else dict(enrolment.roster)
        if enrolment.identity is None or name not in self._roster:
            raise InputError(
                f"site '{name}' has pinned no roster that names it, which secure aggregation needs: get roster.json "
                "from the server's operator (`fedloom server roster`), then at the site `fedloom client pin "
                "roster.json`, and stop and start it"
            )
        self._result = file.with_name("result.sha256")
        self.roster_digest = roster_digest(self._roster)
        self._protocol = SiteProtocol(
            name,
            enrolment.identity,
            self._roster,
            terms_of(recipe, largest_change(recipe)),
            enrolment.minimums,
            run_id,
            kept["protocol"] if kept else None,
        )

    def answer(self, order: SecureOrder) -> SecureReply:
        """A step besides training. Raises ProtocolError for what an honest server would not ask."""
        answer = self._protocol.answer(order.step, order.payload)
        self._save()
        return SecureReply(run_id=self._run_id, step=order.step, payload=answer)

    def mask(self, round_number: int, order: str, context: bytes, vector: RingVector) -> str:
        """Mask the vector in place; returns the signed statement that goes with it."""
        statement = self._protocol.mask(round_number, order, context, vector)
        self._save()
        return statement

    def admit_evaluation(self, final: bool, state_digest: str) -> None:
        """Raise ProtocolError unless this is the run's one result. From then on nothing is masked in this run.

        An evaluation is told in the clear: a server that could have any state evaluated could ask about single records.
        """
        if not final:
            raise ProtocolError("this run aggregates securely: a site's own loss is told of the result alone")
        if self._result.exists() and self._result.read_text(encoding="ascii") != state_digest:
            raise ProtocolError("this run aggregates securely, and another state was evaluated as its result before")
        commit_file(self._result, state_digest.encode())
        self._protocol.erase()
        self._save()

    def _load(self) -> dict[str, Any] | None:
        if not self._file.exists():
            return None
        kept: dict[str, Any] = json.loads(read_private_file(self._file))
        return kept

    def _save(self) -> None:
        kept = {"roster": self._roster, "protocol": self._protocol.record}
        replace_private_file(self._file, json.dumps(kept).encode())
