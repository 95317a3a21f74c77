"""The sites of a run: the connected nodes that are admitted, the terms they joined on, those that are there now.

Knows nothing of rounds or of arithmetic on states.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from core_training import __version__
from core_training.foundation.errors import InputError, ProtocolError, RunError
from core_training.foundation.state import TrainableState
from core_training.recipe.schema import Recipe
from core_training.recipe.site_shares import NEARLY_ALL
from core_training.runs import events
from core_training.runs.run_folder import RunFolder, SiteSummary
from flower_transport.grid import Grid
from server.agreement import (
    PIN_ANOTHER,
    Offer,
    Terms,
    difference,
    majority,
    offer_of,
    unlike_the_run,
    who_announced_what,
)
from server.order_exchange import OrderExchange
from server.progress import Progress
from strategies.messages import JoinOrder, JoinReply

_LOOKS_EVERY = 0.2
"""Seconds between two looks at who is connected."""

_ASKED_AGAIN_AFTER = 5.0
_ASKED_AGAIN_AT_MOST = 60.0
"""Seconds before a site that could not join is asked again; they double each time, up to this."""

_NEWCOMER_WAIT = 5.0
"""Seconds that sites which are ready wait for newcomers. A slower one has joined when it is asked the next time."""

_TOLD_AGAIN_AFTER = 60.0
"""Seconds after which it is told once more who is waited for, and why."""

_RETURNS_WITHIN = 15.0
"""Seconds that a server waits for the sites that took part before, though enough are there: when it was started again,
and at the end of the run, since who is away there gets no result."""


@dataclass(frozen=True)
class _Pause:
    """The pause before a site is asked again to join."""

    seconds: float
    until: float


@dataclass(frozen=True)
class Participants:
    """Those who may take part in a run: `sites()` maps the node ids of the admitted ones to their names, as it is now.

    `roster_of(digest)` is the roster that they have pinned, names and public identities; it raises InputError for one
    that this federation did not hand out. `in_process` is a simulation: the sites train in turn, and nobody comes
    later.
    """

    sites: Callable[[], dict[int, str]]
    roster_of: Callable[[str], Mapping[str, str]] = lambda _: {}
    in_process: bool = False


class Membership:
    """The sites of one run."""

    def __init__(
        self,
        grid: Grid,
        folder: RunFolder,
        recipe: Recipe,
        exchange: OrderExchange,
        participants: Participants,
        *,
        goes_on: bool,
    ) -> None:
        """`goes_on` says that the run had begun before."""
        self._grid = grid
        self._folder = folder
        self._recipe = recipe
        self._exchange = exchange
        self._sites = participants.sites
        self._roster_of = participants.roster_of
        self._patience = 0.0 if participants.in_process else recipe.topology.round_deadline
        self._terms: Terms | None = None
        self._offers: dict[int, Offer] = {}
        """What the connected sites have announced that no vote has been held on yet, by node."""
        self._told_of_holder = ""
        """The last site that was told to hold nearly all records."""
        self._told_divided = ""
        """The last division of the sites that was told."""
        self._names: Mapping[int, str] = {}
        """The run's sites by node, as of the last look: one that is admitted meanwhile comes in with the next."""
        self._joined: dict[int, str] = {}
        self._turned_away: set[int] = set()
        self._pauses: dict[int, _Pause] = {}
        self._returning_until = 0.0
        if goes_on:
            self.wait_for_all()
        self._told: events.WaitingForSites | None = None
        self._tells_again = 0.0
        self.layout: Mapping[str, str] = {}
        """The small files that stand beside the weights of a result, as most sites describe them."""
        self.announced: dict[str, Offer] = {}
        """What the sites that joined had announced."""

    @property
    def terms(self) -> Terms:
        assert self._terms is not None, "no site has joined"
        return self._terms

    @property
    def roster_digest(self) -> str:
        """The digest of the roster that all sites have pinned (secure aggregation)."""
        assert self.terms.roster_digest is not None, "whoever joins has pinned one"
        return self.terms.roster_digest

    def wait_for_all(self) -> None:
        """Have the next `gather` wait a while for all who took part before, though enough are there."""
        self._returning_until = time.monotonic() + min(_RETURNS_WITHIN, self._patience)

    def gather(self, progress: Progress, state: TrainableState | None) -> dict[int, str]:
        """The joined sites that are connected now; waits for the minimum, and lets newcomers join.

        `state` is the run's, where it has one. Raises RunError when patience ends before enough sites are there, and
        where no more than half of them announce the same.
        """
        minimum = self._recipe.needed_sites
        deadline = time.monotonic() + self._patience
        while True:
            connected, self._names = set(self._grid.nodes()), self._sites()
            # Whoever reconnects is asked again, and who has more than it announced.
            self._turned_away &= connected
            self._joined = {node: site for node, site in self._joined.items() if site not in self._exchange.outgrown}
            self._exchange.outgrown.clear()
            self._offers = {node: offer for node, offer in self._offers.items() if node in connected}
            self._pauses = {node: pause for node, pause in self._pauses.items() if node in connected}
            if newcomers := self._newcomers(connected, progress.round):
                ready = self._terms is not None and len(connected & self._joined.keys()) >= minimum
                self._invite(newcomers, progress, _NEWCOMER_WAIT if ready else math.inf)
                self._put_off(newcomers.keys() - self._offers.keys(), newcomers)
            is_over = time.monotonic() >= deadline
            if self._terms is None:
                self._turn_away_misfits(progress, state)
                self._vote(minimum, progress, is_over=is_over)
            if self._terms is not None:
                self._let_join(self._terms, progress)
            present = {
                node: site for node, site in sorted(self._joined.items(), key=lambda i: i[1]) if node in connected
            }
            before = {site for site, part in progress.sites.items() if part.rounds} & set(self._names.values())
            # After a restart sites reconnect one by one: to begin with the first few would leave out the rest.
            returning = not before <= set(present.values()) and time.monotonic() < self._returning_until
            if len(present) >= minimum and not returning:
                self._returning_until = 0.0  # from now on, who is away is waited for no longer
                if self._told is not None:
                    self._folder.event(events.Gathered(live=sorted(present.values()), missing=self._told.missing))
                    self._told = None
                return present
            if is_over:
                raise RunError(
                    f"{len(present)} of at least {minimum} sites were ready within {self._patience:g} s "
                    f"({', '.join(self._recipe.fewest_sites)}; topology.round_deadline). "
                    + self._exchange.recent_reasons()
                )
            if not returning:
                self._give_up_if_too_few_can(minimum)
                self._tell_of_waiting(sorted([*present.values(), *self._offering]), minimum)
            time.sleep(_LOOKS_EVERY)

    def _give_up_if_too_few_can(self, minimum: int) -> None:
        """Raise RunError, with each site's reason, when too few admitted ones are left that may yet serve the run."""
        admitted = set(self._names.values())
        unable = (self._exchange.hopeless & admitted) - set(self._joined.values())
        if not unable or len(admitted) - len(unable) >= minimum:
            return
        reasons = "; ".join(f"{site}: {self._exchange.reasons[site]}" for site in sorted(unable))
        raise RunError(
            f"{len(unable)} of the {len(admitted)} admitted sites cannot serve this run, which needs {minimum}: "
            f"{reasons}. Submit another recipe; or have it mended there, the site stopped and started"
        )

    def _tell_of_waiting(self, present: list[str], minimum: int) -> None:
        """Tell who is there, who is not, and why not: when it changes, and every minute."""
        absent = sorted(set(self._names.values()) - set(present))
        refused = {site: self._exchange.reasons[site] for site in absent if site in self._exchange.reasons}
        missing = [site for site in absent if site not in refused]
        waiting = events.WaitingForSites(sites=present, minimum=minimum, refused=refused, missing=missing)
        if waiting != self._told or time.monotonic() >= self._tells_again:
            self._folder.event(waiting)
            self._told, self._tells_again = waiting, time.monotonic() + _TOLD_AGAIN_AFTER

    def _newcomers(self, connected: set[int], round_number: int) -> dict[int, str]:
        for stranger in sorted(connected - self._names.keys() - self._turned_away):
            self._turned_away.add(stranger)
            reason = "the node is none of the run's sites: it was not admitted, or is left out of this run"
            self._folder.event(events.Quarantined(site=f"node {stranger}", round=round_number, reason=reason))
        now = time.monotonic()
        pausing = {node for node, pause in self._pauses.items() if now < pause.until}
        settled = self._joined.keys() | self._offers.keys() | self._turned_away | pausing
        return {node: self._names[node] for node in sorted((connected & self._names.keys()) - settled)}

    def _put_off(self, nodes: set[int], names: dict[int, str]) -> None:
        """Ask sites that did not join again later, but those no more for which it would not help.

        A simulation asks once: nothing changes there.
        """
        for node in nodes:
            if names[node] in self._exchange.hopeless or self._patience == 0:
                self._turned_away.add(node)
            else:
                earlier = self._pauses.get(node)
                seconds = min(2 * earlier.seconds, _ASKED_AGAIN_AT_MOST) if earlier else _ASKED_AGAIN_AFTER
                self._pauses[node] = _Pause(seconds, time.monotonic() + seconds)

    @property
    def _offering(self) -> dict[str, Offer]:
        """The announcements that wait for a vote, by site."""
        return {self._names[node]: offer for node, offer in self._offers.items() if node in self._names}

    def _invite(self, newcomers: dict[int, str], progress: Progress, patience: float) -> None:
        """Ask sites what they would train, and keep what they announce."""
        order = JoinOrder(run_id=self._folder.run_id, version=__version__, recipe=self._recipe.to_yaml())
        nodes = {site: node for node, site in newcomers.items()}
        for site, reply in self._exchange.ask(order, newcomers, JoinReply, progress.round, patience):
            with self._exchange.quarantine(site, progress.round):
                if reply.run_id != order.run_id:
                    raise ProtocolError(f"the reply belongs to run {reply.run_id}")
                if reply.version != __version__:
                    raise ProtocolError(f"the site runs fedloom {reply.version}, this server {__version__}", fatal=True)
                self._check_roster(reply)
                self._offers[nodes[site]] = offer_of(reply)

    def _turn_away_misfits(self, progress: Progress, state: TrainableState | None) -> None:
        """Let nobody vote, or be waited for, whose announcement does not fit what the run has committed."""
        manifest = None if state is None else state.manifest
        for node, offer in list(self._offers.items()):
            site = self._names.get(node)
            reason = unlike_the_run(offer.terms, progress.initial_digest, manifest)
            if site is not None and reason is not None:
                with self._exchange.quarantine(site, progress.round):
                    del self._offers[node]
                    self._turned_away.add(node)
                    raise ProtocolError(reason, fatal=True)

    def _vote(self, minimum: int, progress: Progress, *, is_over: bool) -> None:
        """Make the run's terms those of more than half of the sites, once the minimum has announced its own.

        Raises RunError where they are divided, and nobody is left to decide it.
        """
        offers = self._offering
        if not offers or (len(offers) < minimum and not is_over):
            return
        self._terms = majority([offer.terms for _, offer in sorted(offers.items())])
        if self._terms is not None:
            self._grid.allow_payloads(self._terms.manifest.max_message_bytes)
            progress.initial_digest = self._terms.initial_digest
            self.layout = next(offer.layout for offer in offers.values() if offer.terms == self._terms)
            return
        divided = events.SitesDisagree(announced=who_announced_what(offers))
        if is_over or self._names.keys() <= self._offers.keys() | self._turned_away:
            raise RunError(divided.note)
        if divided.announced != self._told_divided:
            self._told_divided = divided.announced
            self._folder.event(divided)

    def _let_join(self, agreed: Terms, progress: Progress) -> None:
        """Let those who announced the agreed terms join, and turn the others away."""
        names = self._names
        offers = {names[node]: (node, offer) for node, offer in self._offers.items() if node in names}
        self._offers.clear()
        for site, (node, offer) in sorted(offers.items()):
            with self._exchange.quarantine(site, progress.round):
                if offer.terms != agreed:
                    self._turned_away.add(node)
                    raise ProtocolError(difference(offer, agreed, self.layout), fatal=True)
                self._joined[node] = site
                self._pauses.pop(node, None)
                self._exchange.reasons.pop(site, None)
                self.announced[site] = offer
                progress.sites.setdefault(site, _first_seen(offer))
                joined = events.SiteJoined(
                    site=site, train_examples=offer.data.train_examples, processes=offer.processes
                )
                self._folder.event(joined)
        self._tell_of_one_that_holds_nearly_all()

    def _tell_of_one_that_holds_nearly_all(self) -> None:
        """Tell of a site with nearly all records, once for each that comes to have them."""
        records = {site: offer.data.train_examples for site, offer in self.announced.items()}
        if len(records) < 2:
            return
        site = max(records, key=lambda name: records[name])
        share = records[site] / max(sum(records.values()), 1)
        as_many_steps = self._recipe.topology.local_epochs is None
        if as_many_steps and share >= NEARLY_ALL and site != self._told_of_holder:
            self._told_of_holder = site
            self._folder.event(events.OneSiteHolds(site=site, share=share))

    def _check_roster(self, reply: JoinReply) -> None:
        if (reply.roster_digest is None) != (self._recipe.privacy.secure is None):
            raise ProtocolError(
                "the site does not take the recipe's privacy.secure_aggregation as it stands", fatal=True
            )
        try:
            if reply.roster_digest is not None:
                self._roster_of(reply.roster_digest)
        except InputError:
            raise ProtocolError(
                f"the site has pinned a roster that `fedloom server roster` did not write here; {PIN_ANOTHER}",
                fatal=True,
            ) from None


def _first_seen(offer: Offer) -> SiteSummary:
    data = offer.data
    return SiteSummary(
        data.train_examples,
        data.eval_examples,
        rounds=0,
        truncated=data.truncated,
        dropped=data.dropped,
        units=data.units or None,
    )
