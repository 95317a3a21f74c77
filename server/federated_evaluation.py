"""Federated evaluation: every site of a finished run judges its result on its own records, and sums alone come back.

Under `privacy.secure_aggregation` the sums are masked: what the server opens is the sum over the sites, once for each
question. What is asked next after a kill is what was asked before it: the set-up of the masks is on disk before a site
masks, and the masked vectors are before they are opened.
"""

from __future__ import annotations

import base64
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from core_training.foundation.durable import commit_file
from core_training.foundation.errors import InputError, ProtocolError, RunError
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from evaluation.federated.site_sums import Plan, SiteFigures, from_integers, is_possible
from flower_transport.grid import Grid
from security.secure_aggregation.server import ServerBatch, ServerRound
from server.aggregation import Nodes
from server.evaluation_document import document_of
from server.evaluation_requests import Request, answer, folder_of, give_up, pending
from server.mask_exchange import MaskExchange
from server.membership import Participants
from server.order_exchange import OrderExchange
from server.progress import Progress
from strategies.codec_of_round import NO_VALUES, sums_codec
from strategies.messages import MaskedSums, SumsOrder, SumsReply
from strategies.ring import RingCodec

ATTEMPTS = 3
_COMES_WITHIN = 15.0
"""Seconds that are waited for sites that are not connected, before each attempt."""
_LOOKS_EVERY = 0.2
_ROUND = 1
"""The masks of an evaluation have one round."""
_LARGEST = 2**47
"""Of a number of one site, in the clear: room for the sum of 2^15 sites."""


def evaluate_pending(grid: Grid, folder: RunFolder, participants: Participants) -> None:
    """Answer all requests of a finished run; one that cannot be is given up, with the reason in an event."""
    for request in pending(folder.path):
        try:
            document = FederatedEvaluation(grid, folder, participants, request).document()
        except (InputError, ProtocolError, RunError) as error:
            give_up(folder.path, request, str(error))
        else:
            answer(folder.path, request, document)


class _Kept(BaseModel):
    """The masks of an evaluation on disk: their batch (`ServerBatch`), and with whom and with what room it is spent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    key: str
    roster_digest: str
    number: int
    batch: dict[str, Any]
    sites: list[str]
    room: int
    vectors: dict[str, tuple[str, str]] | None = None
    """Each site's statement and masked vector, once all are there that will be."""


class FederatedEvaluation:
    """One request, carried out. Raises RunError, ProtocolError or InputError where too few sites answer."""

    def __init__(self, grid: Grid, folder: RunFolder, participants: Participants, request: Request) -> None:
        summary = folder.summary() or {}
        if not folder.has_completed or (digest := summary.get("state_digest")) is None:
            raise InputError(f"run {folder.run_id} has no result yet")
        self._grid = grid
        self._folder = folder
        self._participants = participants
        self._request = request
        self._recipe = folder.recipe
        self._round = int(summary.get("rounds") or 0)
        own = self._recipe.topology.own_steps is not None
        self._plan = Plan(tuple(request.metrics), tuple(request.labels), request.resamples, own)
        self._progress = Progress()
        self._exchange = OrderExchange(grid, folder, self._recipe.topology.round_deadline, self._progress)
        self._order = request.order(folder.run_id, digest, max(1, len(participants.sites())))
        self._file = folder_of(folder.path, request.data) / "masks.json"
        self._missing: dict[str, str] = {}

    def document(self) -> dict[str, Any]:
        """The figures, as `results.json` has them."""
        self._grid.allow_payloads(max(2**20, 32 * self._plan.length))
        ready = self._ready()
        own: dict[str, SiteFigures] = {}
        masked = self._recipe.privacy.secure is not None
        if masked:
            figures, sites = self._masked(ready)
        else:
            numbers = self._numbers(ready)
            sites = sorted(numbers)
            figures = from_integers(self._plan, np.sum(list(numbers.values()), axis=0).tolist())
            own = {site: from_integers(self._plan, numbers[site].tolist()) for site in sites if ready[site].tells_own}
        self._note_missing(sites)
        told = events.SitesEvaluated(
            data=self._request.data, n=figures.items, sites=sites, missing=self._missing, masked=masked
        )
        self._folder.event(told)
        return document_of(self._folder.run_id, self._request, self._plan, figures, told, own)

    def _note_missing(self, sites: list[str]) -> None:
        for site in sorted(set(self._participants.sites().values()) - set(sites)):
            self._missing.setdefault(site, self._exchange.reasons.get(site, "it gave no answer"))

    def _ready(self) -> dict[str, SumsReply]:
        """The sites that have judged the result, with their sums where these are not masked."""
        ready: dict[str, SumsReply] = {}
        for _ in range(ATTEMPTS):
            present = self._gather(set(ready))
            asked = {node: site for node, site in present.items() if site not in ready}
            for site, reply in self._exchange.ask(self._order, asked, SumsReply, self._round):
                with self._exchange.quarantine(site, self._round):
                    self._check(reply)
                    ready[site] = reply
            if set(self._participants.sites().values()) <= ready.keys() | self._exchange.hopeless:
                break
        if len(ready) < (least := self._recipe.needed_sites):
            self._note_missing(sorted(ready))
            reasons = "; ".join(f"{site}: {reason}" for site, reason in sorted(self._missing.items()))
            raise RunError(f"{len(ready)} sites judged the result, and the run needs {least} ({reasons})")
        return ready

    def _check(self, reply: SumsReply | MaskedSums) -> None:
        if (reply.run_id, reply.key) != (self._order.run_id, self._order.key):
            raise ProtocolError("the reply belongs to another evaluation")

    def _gather(self, settled: set[str]) -> dict[int, str]:
        """The connected sites that may yet answer; those that are not connected are waited for, for a while."""
        until = time.monotonic() + (0.0 if self._participants.in_process else _COMES_WITHIN)
        while True:
            names, nodes = self._participants.sites(), set(self._grid.nodes())
            wanted = {node: site for node, site in names.items() if site not in settled | self._exchange.hopeless}
            if wanted.keys() <= nodes or time.monotonic() >= until:
                return {node: site for node, site in sorted(wanted.items()) if node in nodes}
            time.sleep(_LOOKS_EVERY)

    def _numbers(self, ready: Mapping[str, SumsReply]) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
        """Each site's numbers; what is none of this evaluation's is set aside. Raises RunError for too few sites."""
        numbers = {}
        for site, reply in ready.items():
            with self._exchange.quarantine(site, self._round):
                if len(reply.payload) != 8 * self._plan.length:
                    raise ProtocolError(f"{len(reply.payload)} bytes; it takes {8 * self._plan.length}")
                own = np.frombuffer(reply.payload, dtype="<i8").astype(np.int64)
                if (own > _LARGEST).any() or (own < -_LARGEST).any() or not is_possible(self._plan, own.tolist()):
                    raise ProtocolError("these are no sums over items")
                numbers[site] = own
        if len(numbers) < (least := self._recipe.needed_sites):
            raise RunError(f"{len(numbers)} sites sent sums, and the run needs {least}")
        return numbers

    def _masked(self, ready: Mapping[str, SumsReply]) -> tuple[SiteFigures, list[str]]:
        """The sum of the sites' vectors, and whose are in it. Raises ProtocolError where it cannot be opened."""
        kept = self._recalled() or self._set_up(ready)
        exchange = self._exchange_of(kept.roster_digest)
        batch = exchange.recalled_batch(kept.number, 1, kept.batch)
        if batch is None:
            raise ProtocolError("the sites have another roster than when the masks of this evaluation were set up")
        order = self._order.model_copy(update={"sites": kept.room})
        codec = sums_codec(self._recipe, self._plan.length, kept.room)
        masked = ServerRound(batch, 0, _ROUND, exchange.context_of_sums(order), codec.length, kept.sites)
        if kept.vectors is None:
            vectors = self._vectors(order, masked, codec)
            try:
                batch.check_together(list(vectors))
            except ProtocolError as error:  # nothing is opened: who masked gives the same bytes to the same question
                raise ProtocolError(f"too few sent their masked sums, ask again for the same: {error}") from None
            # On disk before any is opened: a site that has helped to open the sum masks nothing again.
            self._keep(kept.model_copy(update={"vectors": vectors}))
        for site, (statement, text) in (kept.vectors or {}).items():
            masked.add(site, statement, codec.from_bytes(base64.b64decode(text)))
        for reason in exchange.open({0: masked}, self._nodes(kept.sites), self._round).values():
            raise ProtocolError(f"the sum cannot be opened: {reason}")
        opened = codec.decode(masked.finish(), len(masked.survivors), NO_VALUES)
        return from_integers(self._plan, opened.figures), masked.survivors

    def _vectors(self, order: SumsOrder, masked: ServerRound, codec: RingCodec) -> dict[str, tuple[str, str]]:
        """Take in the masked vectors of those that send one; who does not is asked again. Returns what they sent."""
        vectors: dict[str, tuple[str, str]] = {}
        orders = {site: order.model_copy(update={"masking": masked.mask_order(site)}) for site in masked.participants}
        for _ in range(ATTEMPTS):
            waiting = self._gather(set(vectors) | (set(self._participants.sites().values()) - orders.keys()))
            for site, reply in self._exchange.ask(orders, waiting, MaskedSums, self._round):
                with self._exchange.quarantine(site, self._round):
                    self._check(reply)
                    masked.add(site, reply.statement, codec.from_bytes(reply.payload))
                    vectors[site] = (reply.statement, base64.b64encode(bytes(reply.payload)).decode("ascii"))
            if orders.keys() <= vectors.keys() | self._exchange.hopeless:
                break
        return vectors

    def _set_up(self, ready: Mapping[str, SumsReply]) -> _Kept:
        """Have the sites set masks up among them; on disk before a site masks."""
        digests = Counter(reply.roster_digest for reply in ready.values())
        digest = max(digests, key=lambda one: (digests[one], str(one)))
        if digest is None:
            raise ProtocolError("no site has told which roster it has pinned")
        sites = sorted(site for site, reply in ready.items() if reply.roster_digest == digest)
        for site in ready.keys() - set(sites):
            self._missing[site] = "it has pinned another roster than most sites"
        exchange = self._exchange_of(digest)
        batch: ServerBatch = exchange.new_batch(1)
        present = self._nodes(sites)
        for reason in exchange.set_up({0: batch}, {0: list(present.values())}, present, self._round).values():
            raise ProtocolError(f"masks cannot be set up: {reason}")
        kept = _Kept(
            key=self._order.key,
            roster_digest=digest,
            number=batch.batch.number,
            batch=batch.record,
            sites=batch.sites,
            room=len(batch.sites),
        )
        self._keep(kept)
        return kept

    def _exchange_of(self, roster_digest: str) -> MaskExchange:
        return MaskExchange(
            self._folder,
            self._recipe,
            self._exchange,
            self._progress,
            lambda: self._participants.roster_of(roster_digest),
            self._order.key,
        )

    def _nodes(self, sites: list[str]) -> Nodes:
        nodes = set(self._grid.nodes())
        names = self._participants.sites()
        return {node: site for node, site in names.items() if site in sites and node in nodes}

    def _keep(self, kept: _Kept) -> None:
        commit_file(self._file, kept.model_dump_json().encode())

    def _recalled(self) -> _Kept | None:
        """The masks of this very question, where they were set up before."""
        if not self._file.exists():
            return None
        kept = _Kept.model_validate_json(self._file.read_bytes())
        return kept if kept.key == self._order.key else None
