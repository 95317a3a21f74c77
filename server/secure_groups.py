"""The server's side of secure aggregation where a round's sites are in groups: each group is a cohort of its own.

Groups are drawn anew each round, so masks are set up in each: two slots for every group, one for the sum of its updates
and one for that of its votes. What a site demands of a cohort (threshold, minimum) it so demands of its group. The
set-up is on disk before a site is asked to mask, so that a server which was killed asks the same groups again: a site
masks an update and a vote once a round, and gives no others.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pydantic import BaseModel, ConfigDict

from core_training.foundation.durable import commit_file
from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import TrainableState
from core_training.parts.aggregation_rules.group_gate import FEWEST_GROUPS
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from security.secure_aggregation.server import ServerBatch, ServerRound
from server.aggregation import Cohort, Nodes, RoundAggregation, check_belongs
from server.agreement import Terms
from server.group_rounds import Groups, Voting
from server.mask_exchange import MaskExchange
from server.secure_rounds import MaskedAggregation
from strategies.codec_of_round import NO_VALUES, vote_codec
from strategies.group_gate import Ballot, mask_number
from strategies.messages import MaskedVote, Message, TrainOrder, VoteOrder
from strategies.outer_steps.outer_step import Memory

_UPDATES, _VOTES = 0, 1
"""The slots of a group."""


class _KeptGroup(BaseModel):
    """A group's batch, as `ServerBatch` has it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    batch_number: int
    batch: dict[str, Any]


class _Kept(BaseModel):
    """The set-up of a round on disk: its groups, by number."""

    model_config = ConfigDict(extra="forbid", strict=True)

    round: int = 0
    groups: dict[str, _KeptGroup] = {}


class SecureGroups:
    """The masks of one run."""

    def __init__(self, folder: RunFolder, recipe: Recipe, exchange: MaskExchange) -> None:
        self._folder = folder
        self._recipe = recipe
        self._exchange = exchange
        self._file = folder.path / "masks-groups.json"
        self._round = 0
        self._batches: dict[int, ServerBatch] = {}
        self._recalled = False

    def together(self, number: int, groups: Groups, present: Nodes) -> Groups:
        """The groups whose masks meet in round `number`, with those of their sites that set them up.

        Those of an attempt at this very round that was cut short are asked again, and no others. Raises ProtocolError
        when too few groups can be set up.
        """
        if not self._recalled and self._file.exists():
            self._recall()
        self._recalled = True
        if self._round != number:
            self._set_up(number, groups, present)
        return {group: batch.sites for group, batch in self._batches.items()}

    def begin(
        self, order: TrainOrder, cohort: Cohort, terms: Terms, start: TrainableState, memory: Memory
    ) -> dict[int, RoundAggregation]:
        return {
            group: MaskedAggregation(_MasksOfGroup(self, group), self._recipe, order, one, terms, start)
            for group, one in cohort.groups.items()
        }

    def open(self, number: int, parts: Mapping[int, RoundAggregation]) -> None:
        """Have the survivors of all groups open their sums, in one exchange."""
        masked = {group: part.masked for group, part in parts.items() if isinstance(part, MaskedAggregation)}
        nodes = {node: site for part in parts.values() for node, site in part.asked.items()}
        self._exchange.open(masked, nodes, number)

    def voting(self, order: VoteOrder, voters: Groups, terms: Terms) -> Voting:
        return MaskedVoting(self, self._exchange, self._recipe, order, voters, terms)

    def spend_update(
        self, group: int, order: TrainOrder, terms: Terms, start: TrainableState, length: int
    ) -> ServerRound:
        """The protocol's side of a group's updates."""
        context = self._exchange.context(order, start, terms)
        batch, place = self._batches[group], mask_number(self._recipe, order.round)
        return ServerRound(batch, _UPDATES, place, context, length, batch.sites)

    def spend_vote(self, group: int, order: VoteOrder, terms: Terms, sites: list[str], length: int) -> ServerRound:
        """The protocol's side of a group's votes, of those whose updates are in its sum. Raises ProtocolError."""
        context = self._exchange.context_of_vote(order, terms)
        place = mask_number(self._recipe, order.round, vote=True)
        return ServerRound(self._batches[group], _VOTES, place, context, length, sites)

    def _set_up(self, number: int, groups: Groups, present: Nodes) -> None:
        began = time.perf_counter()
        batches = {group: self._exchange.new_batch(2, place=group) for group in groups}
        for group, reason in self._exchange.set_up(batches, groups, present, number).items():
            del batches[group]
            said = f"its masks cannot be set up: {reason}"
            self._folder.event(events.GroupLeftOut(round=number, group=group, sites=sorted(groups[group]), reason=said))
        if len(batches) < FEWEST_GROUPS:
            raise ProtocolError(f"the masks of {len(batches)} groups meet, and it takes {FEWEST_GROUPS}")
        kept = {str(group): _KeptGroup(batch_number=b.batch.number, batch=b.record) for group, b in batches.items()}
        # On disk before a site is asked: a slot used for two sums would show the difference of two updates.
        commit_file(self._file, _Kept(round=number, groups=kept).model_dump_json().encode())
        self._round, self._batches = number, batches
        sites = sorted(site for batch in batches.values() for site in batch.sites)
        seconds = round(time.perf_counter() - began, 3)
        self._folder.event(events.MasksSetUp(round=number, rounds=1, sites=sites, seconds=seconds))

    def _recall(self) -> None:
        """Take up the groups whose slots were being spent; without them, masks are set up anew."""
        kept = _Kept.model_validate_json(self._file.read_bytes())
        recalled = {
            int(group): self._exchange.recalled_batch(one.batch_number, 2, one.batch)
            for group, one in kept.groups.items()
        }
        batches = {group: batch for group, batch in recalled.items() if batch is not None}
        if len(batches) == len(recalled):
            self._batches, self._round = batches, kept.round


class _MasksOfGroup:
    """The masks of one group, as its aggregation needs them."""

    def __init__(self, groups: SecureGroups, group: int) -> None:
        self._groups = groups
        self._group = group

    def spend(
        self, order: TrainOrder, participants: list[str], terms: Terms, start: TrainableState, length: int
    ) -> ServerRound:
        return self._groups.spend_update(self._group, order, terms, start, length)

    def open(self, number: int, masked: ServerRound, nodes: Nodes) -> None:
        """Do nothing: all groups' sums were opened together."""

    def note(self, number: int, delivered: object, missing: object) -> None:
        """Do nothing: masks are set up in each round."""


class MaskedVoting:
    """Masked votes: one by itself says nothing, and their sum opens once the group's survivors agree to it."""

    reply = MaskedVote

    def __init__(
        self,
        masks: SecureGroups,
        exchange: MaskExchange,
        recipe: Recipe,
        order: VoteOrder,
        voters: Groups,
        terms: Terms,
    ) -> None:
        self._exchange = exchange
        self._order = order
        self._codec = vote_codec(recipe, order.candidates, order.sites)
        self._sums: dict[int, ServerRound] = {}
        for group, sites in voters.items():
            self._sums[group] = masks.spend_vote(group, order, terms, sites, self._codec.length)
        self._sum_of = {site: one for one in self._sums.values() for site in one.participants}

    def orders(self) -> Mapping[str, Message]:
        return {
            site: self._order.model_copy(update={"masking": one.mask_order(site)}) for site, one in self._sum_of.items()
        }

    def take(self, site: str, vote: MaskedVote) -> None:
        check_belongs(vote, self._order)
        self._sum_of[site].add(site, vote.statement, self._codec.from_bytes(vote.payload))

    def ballots(self, nodes: Nodes) -> dict[int, Ballot]:
        self._exchange.open(self._sums, nodes, self._order.round)
        ballots = {}
        for group, one in self._sums.items():
            with suppress(ProtocolError):  # a group without a voice, which the event of the vote says
                opened = self._codec.decode(one.finish(), len(one.survivors), NO_VALUES)
                ballots[group] = Ballot.from_integers(opened.figures)
        return ballots
