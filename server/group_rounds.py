"""Rounds whose sites are in groups: each group's mean is tried by all sites, and the good ones are averaged.

The vote is an exchange of its own, after the updates came in. Nothing of it is kept: a server that was killed in it
holds the round again or, where its masks are spent, the next one. Which groups are good, `strategies.group_gate` says;
how sums and votes are opened under masks, `server.secure_groups`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import TrainableState
from core_training.parts.aggregation_rules.group_gate import FEWEST_GROUPS, GROUP_GATE
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from server.aggregation import ClearRounds, Cohort, Nodes, Outcome, RoundAggregation, check_belongs
from server.agreement import Offer, Terms
from server.order_exchange import OrderExchange
from server.progress import RoundReport
from strategies.bounds import check_evaluation
from strategies.fedavg import FedAvg
from strategies.figures import RoundFigures
from strategies.group_gate import Ballot, drawn_groups, let_through, middle_of, rises_of
from strategies.messages import MaskedVote, Message, TrainOrder, Vote, VoteOrder
from strategies.outer_steps.outer_step import Memory
from strategies.ring_scale import Scale

Groups = Mapping[int, list[str]]
"""The sites of each group, by its number."""


class Voting(Protocol):
    """The votes of one round's groups."""

    @property
    def reply(self) -> type[Vote] | type[MaskedVote]:
        """The kind of the votes as they come."""
        ...

    def orders(self) -> Message | Mapping[str, Message]:
        """The sites' orders: the same for all, or one for each."""
        ...

    def take(self, site: str, vote: Any) -> None:
        """Take in a vote. Raises ProtocolError, changing nothing, for what must not enter a sum."""
        ...

    def ballots(self, nodes: Nodes) -> dict[int, Ballot]:
        """The sum of each group's, for those that have one; `nodes` are those of the voters."""
        ...


class Grouping(Protocol):
    """How a run's groups come to their sums."""

    def together(self, number: int, groups: Groups, present: Nodes) -> Groups:
        """The groups of round `number`, of those that were drawn, of which a sum can be had. Raises ProtocolError."""
        ...

    def begin(
        self, order: TrainOrder, cohort: Cohort, terms: Terms, start: TrainableState, memory: Memory
    ) -> dict[int, RoundAggregation]:
        """The aggregation of each group of the cohort."""
        ...

    def open(self, number: int, parts: Mapping[int, RoundAggregation]) -> None:
        """Have the sums opened of those groups whose updates came in."""
        ...

    def voting(self, order: VoteOrder, voters: Groups, terms: Terms) -> Voting:
        """The votes of these sites on the order's states."""
        ...


class ClearGroups:
    """Groups whose updates and votes the server sees one by one; `announced` is what the sites had announced."""

    def __init__(self, recipe: Recipe, announced: Mapping[str, Offer]) -> None:
        self._recipe = recipe
        self._announced = announced
        self._rounds = ClearRounds(recipe, announced)

    def together(self, number: int, groups: Groups, present: Nodes) -> Groups:
        return groups

    def begin(
        self, order: TrainOrder, cohort: Cohort, terms: Terms, start: TrainableState, memory: Memory
    ) -> dict[int, RoundAggregation]:
        groups = cohort.groups.items()
        return {number: self._rounds.begin(order, group, terms, start, memory) for number, group in groups}

    def open(self, number: int, parts: Mapping[int, RoundAggregation]) -> None:
        """Do nothing: every update was seen."""

    def voting(self, order: VoteOrder, voters: Groups, terms: Terms) -> Voting:
        return ClearVoting(self._recipe, order, voters, self._announced)


class ClearVoting:
    """Votes that the server sees one by one, each held against what its site can have measured."""

    reply = Vote

    def __init__(self, recipe: Recipe, order: VoteOrder, voters: Groups, announced: Mapping[str, Offer]) -> None:
        self._recipe = recipe
        self._order = order
        self._group_of = {site: number for number, sites in voters.items() for site in sites}
        self._announced = announced
        self._ballots: dict[int, Ballot] = {}

    def orders(self) -> Message:
        return self._order

    def take(self, site: str, vote: Vote) -> None:
        check_belongs(vote, self._order)
        ballot = Ballot.from_integers(vote.ballot)
        if len(ballot.losses) != self._order.candidates or ballot.weight < 0:
            raise ProtocolError(f"it is no ballot on {self._order.candidates} states")
        for report in ballot.reports():
            check_evaluation(self._recipe, report, self._announced[site].data)
        group = self._group_of[site]
        self._ballots[group] = self._ballots[group] + ballot if group in self._ballots else ballot

    def ballots(self, nodes: Nodes) -> dict[int, Ballot]:
        return self._ballots


class GroupRounds:
    """All rounds of a run whose rule is of groups."""

    def __init__(self, folder: RunFolder, recipe: Recipe, exchange: OrderExchange, grouping: Grouping) -> None:
        self._folder = folder
        self._recipe = recipe
        self._exchange = exchange
        self._grouping = grouping

    def cohort(self, number: int, asked: Nodes, present: Nodes) -> Cohort:
        drawn = dict(enumerate(drawn_groups(self._recipe, number, asked.values()), start=1))
        groups = self._grouping.together(number, drawn, present)
        if len(groups) < FEWEST_GROUPS:
            raise ProtocolError(f"{len(groups)} groups came together, and it takes {FEWEST_GROUPS}")
        return Cohort.in_groups(sorted(site for sites in groups.values() for site in sites), groups, present)

    def begin(
        self, order: TrainOrder, cohort: Cohort, terms: Terms, start: TrainableState, memory: Memory
    ) -> RoundAggregation:
        parts = self._grouping.begin(order, cohort, terms, start, memory)
        return GroupAggregation(self._folder, self._recipe, self._exchange, self._grouping, order, cohort, parts, terms)

    def renew(self) -> None:
        """Do nothing: each round draws its groups."""


class GroupAggregation(RoundAggregation):
    """One attempt at a round: an aggregation of each group, and the vote on their means."""

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        exchange: OrderExchange,
        grouping: Grouping,
        order: TrainOrder,
        cohort: Cohort,
        parts: Mapping[int, RoundAggregation],
        terms: Terms,
    ) -> None:
        super().__init__(recipe, order, cohort.asked)
        self._folder = folder
        self._exchange = exchange
        self._grouping = grouping
        self._cohort = cohort
        self._parts = parts
        self._terms = terms
        self._settings = recipe.aggregation.settings(GROUP_GATE)
        self._part_of = {site: part for group, part in parts.items() for site in cohort.groups[group].sites}
        any_part = next(iter(parts.values()))
        self.reply, self.repeatable = any_part.reply, any_part.repeatable

    def orders(self) -> Message | Mapping[str, Message]:
        orders: dict[str, Message] = {}
        for part in self._parts.values():
            if isinstance(own := part.orders(), Message):  # nothing in it is of one site or group
                return own
            orders |= own
        return orders

    def take(self, site: str, update: Any) -> None:
        part = self._part_of[site]
        part.take(site, update)
        self.sites[site] = part.sites[site]

    def outcome(self, least: int) -> Outcome:
        """The mean of the good groups. Raises ProtocolError where there is none; `least` is to begin with."""
        return super().outcome(self._recipe.topology.fewest_sites)

    def _outcome(self) -> Outcome:
        number = self._order.round
        self._grouping.open(number, self._parts)
        means: dict[int, Outcome] = {}
        for group, part in self._parts.items():
            try:
                means[group] = part.outcome(1)
            except ProtocolError as error:
                self._leave_out(group, f"it has no sum: {error}")
        if len(means) < FEWEST_GROUPS:
            raise ProtocolError(f"{len(means)} groups have a sum, and it takes {FEWEST_GROUPS} to tell which are good")
        # From here on the same updates would come to the same: what fails is the round.
        self.repeatable = False
        ballots = self._vote(means)
        rises = dict(zip(means, rises_of(ballots, len(means)), strict=True))
        kept = dict(zip(means, let_through(list(rises.values()), self._settings), strict=True))
        told = {
            str(group): {
                "sites": sorted(self._parts[group].sites),
                "rise": round(rise, 6),
                "kept": kept[group],
                "voted": group in ballots,
            }
            for group, rise in rises.items()
        }
        self._folder.event(events.GroupsTried(round=number, groups=told))
        middle = middle_of(list(rises.values()))
        for group, rise in rises.items():
            if not kept[group]:
                said = f"its mean changes the held-out loss by {rise:+.4f}, that of the middle group by {middle:+.4f}"
                self._leave_out(group, said, rise)
        if not any(kept.values()):
            raise ProtocolError(
                f"each group's mean raises the held-out loss by more than {self._settings.most_rise:g} "
                "(aggregation.group_gate.most_rise)"
            )
        return _together([means[group] for group in means if kept[group]])

    def _vote(self, means: Mapping[int, Outcome]) -> dict[int, Ballot]:
        """Have the sites whose group has a mean try all of them."""
        order = VoteOrder(
            run_id=self._order.run_id,
            round=self._order.round,
            manifest_digest=self._order.manifest_digest,
            candidates=len(means),
            sites=self._cohort.room,
            payload=b"".join(mean.state.to_bytes() for mean in means.values()),
        )
        voters = {group: sorted(self._parts[group].sites) for group in means}
        voting = self._grouping.voting(order, voters, self._terms)
        who = {site for sites in voters.values() for site in sites}
        nodes = {node: site for node, site in self.asked.items() if site in who}
        for site, vote in self._exchange.ask(voting.orders(), nodes, voting.reply, order.round, payload=order.payload):
            with self._exchange.quarantine(site, order.round):
                voting.take(site, vote)
        return voting.ballots(nodes)

    def _leave_out(self, group: int, reason: str, rise: float | None = None) -> None:
        sites = sorted(self._cohort.groups[group].sites)
        event = events.GroupLeftOut(round=self._order.round, group=group, sites=sites, reason=reason, rise=rise)
        self._folder.event(event)


def _together(means: list[Outcome]) -> Outcome:
    """The mean of means, by their weights, and the figures of their sites."""
    mean = FedAvg(means[0].state.manifest)
    for one in means:
        mean.add(one.state, one.weight)
    figures = sum((one.report.figures for one in means), start=RoundFigures())
    sites = {site: part for one in means for site, part in one.report.sites.items()}
    saturated = [one.report.saturated for one in means if one.report.saturated is not None]
    scales = [one.scale for one in means if one.scale is not None]
    return Outcome(
        mean.result(),
        RoundReport(figures, sites, sum(saturated) if saturated else None),
        Scale.widest(scales) if scales else None,
        weight=sum(one.weight for one in means),
    )
