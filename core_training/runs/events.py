"""The events of a run: one type for each kind of event, and its form as a line of `events.jsonl`.

A line has the time, the kind's name under `event`, and its fields. Kinds of different topologies share a name where
people look for one; they are told apart by their fields. Lines may gain fields, and never lose any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from pydantic import TypeAdapter, ValidationError

from core_training.foundation.foreign_text import harmless
from core_training.foundation.trainable import StepFigures
from core_training.recipe.site_shares import said_of_one_that_holds


@dataclass(frozen=True, kw_only=True)
class Event:
    """One event of a run."""

    NAME: ClassVar[str] = ""

    def __post_init__(self) -> None:
        # An event goes to files, logs and terminals, and others' words can be in any field of it.
        for one in fields(self):
            if isinstance(text := getattr(self, one.name), str):
                object.__setattr__(self, one.name, harmless(text))

    @property
    def note(self) -> str | None:
        """The news in it for a person; None for an event that is as it should be."""
        return None

    def document(self) -> dict[str, Any]:
        """Its name and its fields, as JSON has them."""
        own = {one.name: getattr(self, one.name) for one in fields(self)}
        more = own.pop("figures", {})
        return {"event": self.NAME, **own, **more}


@dataclass(frozen=True, kw_only=True)
class Unknown(Event):
    """A line of another version's, or of nobody's."""

    line: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class HubModelFound(Event):
    """The run's base model is one of the hub's: at which commit, in which folder here, with which weights."""

    NAME = "hub_model"
    model: str
    revision: str | None
    digest: str | None
    folder: str


# Runs of one process


@dataclass(frozen=True, kw_only=True)
class CentralStarted(Event):
    NAME = "started"
    total_steps: int
    train_examples: int
    eval_examples: int
    truncated: int
    dropped: int
    units: int = 0


@dataclass(frozen=True, kw_only=True)
class ResumedAtStep(Event):
    NAME = "resumed"
    step: int


@dataclass(frozen=True, kw_only=True)
class StepsTrained(Event):
    """`loss` is a mean over `weight` units; `figures` are the stage's own, each a field of the line."""

    NAME = "trained"
    step: int
    loss: float
    weight: float
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """`evaluation` has the report of each source of records."""

    NAME = "evaluated"
    step: int
    loss: float | None
    evaluation: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class StoppedEarlyAtStep(Event):
    NAME = "stopped_early"
    step: int

    @property
    def note(self) -> str:
        return f"stopped early at step {self.step}: the held-out loss falls no more"


@dataclass(frozen=True, kw_only=True)
class BestChosen(Event):
    """The result is an earlier state than the last, the best of those that were evaluated.

    It stood at the end of `step` in a central run, of `round` in others.
    """

    NAME = "best_chosen"
    eval_loss: float
    step: int | None = None
    round: int | None = None

    @property
    def note(self) -> str:
        place = f"step {self.step}" if self.round is None else f"round {self.round}"
        return f"the result is the state at the end of {place}, the best on the held-out records"


@dataclass(frozen=True, kw_only=True)
class Interrupted(Event):
    """A signal has stopped the run, which can go on: from the end of `step` in a central run, of `round` in others."""

    NAME = "interrupted"
    step: int | None = None
    round: int | None = None


@dataclass(frozen=True, kw_only=True)
class CentralCompleted(Event):
    NAME = "completed"
    step: int
    eval_loss: float | None


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """A run has ended before its time; `step` is the one that a central run stands at."""

    NAME = "failed"
    reason: str
    step: int | None = None

    @property
    def note(self) -> str:
        return f"failed: {self.reason}"


# Runs of any topology, where the steps are taken


@dataclass(frozen=True, kw_only=True)
class StepsLogged(Event):
    """A point of the curve: the figures of the steps since the point before, the last of them `step`.

    `loss` is a mean over `weight` units, `grad_norm` the mean norm before clipping; `tokens` entered the loss.
    `figures` are the stage's own, each a field of the line. `round` is None in a central run.
    """

    NAME = "logged"
    step: int
    loss: float
    weight: int
    learning_rate: float
    grad_norm: float | None
    tokens: int
    tokens_per_second: float
    round: int | None = None
    figures: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, told: StepFigures, round_number: int | None = None) -> Self:
        """The event of a point that training told."""
        return cls(
            step=told.step,
            loss=told.loss,
            weight=told.weight,
            learning_rate=told.learning_rate,
            grad_norm=told.grad_norm,
            tokens=told.tokens,
            tokens_per_second=told.tokens / max(told.seconds, _SHORTEST),
            round=round_number,
            figures=told.figures,
        )


_MOST_LETTERS = 300
"""Of a site's reason, where the reasons of several stand in one line."""

_SHORTEST = 1e-9
"""Seconds: no clock is finer."""


# Federated runs, at the server


@dataclass(frozen=True, kw_only=True)
class FederatedStarted(Event):
    NAME = "started"
    rounds: int | None


@dataclass(frozen=True, kw_only=True)
class ResumedAtRound(Event):
    """A run goes on after this round; `rounds_done` of those up to it counted."""

    NAME = "resumed"
    round: int
    rounds_done: int | None = None


@dataclass(frozen=True, kw_only=True)
class Rewound(Event):
    """A person took a run back to the end of this round (0: its start), to go on without these sites.

    `rounds_done` of the rounds up to it counted.
    """

    NAME = "rewound"
    round: int
    rounds_done: int
    without: Sequence[str]

    @property
    def note(self) -> str:
        without = f", to go on without {', '.join(self.without)}" if self.without else ""
        return f"taken back to the end of round {self.round}{without}"


@dataclass(frozen=True, kw_only=True)
class SiteJoined(Event):
    NAME = "joined"
    site: str
    train_examples: int
    processes: int = 1


@dataclass(frozen=True, kw_only=True)
class OneSiteHolds(Event):
    """One site holds nearly all records."""

    NAME = "one_site_holds"
    site: str
    share: float

    @property
    def note(self) -> str:
        return said_of_one_that_holds(self.site, self.share)


@dataclass(frozen=True, kw_only=True)
class WaitingForSites(Event):
    """Too few sites are there. `refused` has the reason of each that could not join, `missing` are not connected."""

    NAME = "waiting"
    sites: Sequence[str]
    minimum: int
    refused: Mapping[str, str] = field(default_factory=dict)
    missing: Sequence[str] = ()

    @property
    def note(self) -> str:
        parts = [f"waiting for {self.minimum} sites, {len(self.sites)} are there"]
        parts += [f"{site} could not join: {reason[:_MOST_LETTERS]}" for site, reason in self.refused.items()]
        parts += [f"not connected: {', '.join(self.missing)}"] if self.missing else []
        return "; ".join(parts)


@dataclass(frozen=True, kw_only=True)
class SitesDisagree(Event):
    """No more than half of the sites that answered announce the same; `announced` says who announced what."""

    NAME = "undecided"
    announced: str

    @property
    def note(self) -> str:
        return (
            f"no more than half of the sites announce the same: {self.announced}; what differs must be made alike "
            "(base model, files, versions), or one more site must decide it"
        )


@dataclass(frozen=True, kw_only=True)
class Quarantined(Event):
    """A site's answer was set aside, with the reason."""

    NAME = "quarantined"
    site: str
    round: int
    reason: str

    @property
    def note(self) -> str:
        return f"{self.site} was set aside: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Late(Event):
    """A site did not answer an order of this kind before its deadline."""

    NAME = "late"
    site: str
    round: int
    order: str

    @property
    def note(self) -> str:
        return f"{self.site} did not answer in time"


@dataclass(frozen=True, kw_only=True)
class OwnModelTuned(Event):
    """A site trained the common model on: the best that it came to, after `steps`; None where nothing was better.

    It began at `share` of the way from the run's start to the common model. `reason` says why it went no further,
    where it failed.
    """

    NAME = "own_model"
    steps: int
    eval_loss: float | None = None
    common_eval_loss: float | None = None
    reason: str = ""
    share: float = 1.0

    @property
    def note(self) -> str:
        if self.common_eval_loss is None:
            return f"no model of this site's own: {self.reason}"
        common = f"the common model's is {self.common_eval_loss:.4f}"
        if self.reason:
            common += f" (it went no further: {self.reason})"
        if self.eval_loss is None:
            return f"no model of this site's own was better on its records in {self.steps} steps: {common}"
        start = "" if self.share == 1 else f" from {self.share:.0%} of the way to the common model"
        return f"own model (own/) after {self.steps} steps{start}: held-out loss {self.eval_loss:.4f}, {common}"


@dataclass(frozen=True, kw_only=True)
class NotAwaited(Event):
    """A round had the updates it wanted before these sites, asked beyond them, had answered."""

    NAME = "not_awaited"
    round: int
    sites: Sequence[str]

    @property
    def note(self) -> str | None:
        return f"round {self.round} goes on without {', '.join(self.sites)}" if self.sites else None


@dataclass(frozen=True, kw_only=True)
class AskedAgain(Event):
    """A server that was away asks the sites that were at work for the same: each for the update of its round."""

    NAME = "asked_again"
    round: int
    sites: Mapping[str, int]

    @property
    def note(self) -> str:
        began = ", ".join(f"{site} (round {number})" for site, number in sorted(self.sites.items()))
        return f"the updates that were on their way are asked for again: {began}"


@dataclass(frozen=True, kw_only=True)
class CohortLeftOut(Event):
    """What sites that began together came to is in no round, for the `reason`."""

    NAME = "cohort_left_out"
    round: int
    sites: Sequence[str]
    reason: str

    @property
    def note(self) -> str:
        return f"round {self.round} leaves out {', '.join(self.sites)}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class GroupLeftOut(Event):
    """A group's sites are not in a round's mean: their mean's held-out loss is above that of the start by `rise`.

    None: it was not tried, for the `reason`.
    """

    NAME = "group_left_out"
    round: int
    group: int
    sites: Sequence[str]
    reason: str
    rise: float | None = None

    @property
    def note(self) -> str:
        return f"round {self.round} leaves out group {self.group} ({', '.join(self.sites)}): {self.reason}"


@dataclass(frozen=True, kw_only=True)
class GroupsTried(Event):
    """The means of a round's groups were tried on all sites' held-out records.

    `groups` has of each, by number, its `sites`, its `rise` of the held-out loss over that of the start (a median over
    the groups' votes), whether it is in the round's mean (`kept`), and whether its own vote counted (`voted`).
    """

    NAME = "groups_tried"
    round: int
    groups: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class SitesEvaluated(Event):
    """The run's result was judged by these sites on their data sets of one name; `missing` says why others did not."""

    NAME = "sites_evaluated"
    data: str
    n: int
    sites: Sequence[str]
    missing: Mapping[str, str]
    masked: bool


@dataclass(frozen=True, kw_only=True)
class EvaluationFailed(Event):
    """The sites' figures on a data set could not be had; the run is as it was."""

    NAME = "evaluation_failed"
    data: str
    reason: str

    @property
    def note(self) -> str:
        return f"the evaluation on '{self.data}' failed: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class ResultJudged(Event):
    """At a site: the result was judged on one of its own data sets, and sums over so many items may be told."""

    NAME = "result_judged"
    data: str
    items: int


@dataclass(frozen=True, kw_only=True)
class MasksSetUp(Event):
    """From `round` on, for so many rounds, these sites' masks meet; setting them up took so many seconds."""

    NAME = "masks_set_up"
    round: int
    rounds: int
    sites: Sequence[str]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class AttemptVoid(Event):
    """Too few sites answered in an attempt at a round, which is tried again."""

    NAME = "void"
    round: int
    attempt: int
    sites: Sequence[str]
    reason: str


@dataclass(frozen=True, kw_only=True)
class OuterRate(Event):
    """How often a round's outer step goes the way from its start to the mean, where the round's norms say it."""

    NAME = "outer_rate"
    round: int
    rate: float


@dataclass(frozen=True, kw_only=True)
class RoundVoid(Event):
    """A round changed nothing, and is not tried again."""

    NAME = "round_void"
    round: int
    reason: str

    @property
    def note(self) -> str:
        return f"round {self.round} is void and changed nothing: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Round(Event):
    """A round counted. Losses are means over all sites' units, `eval_loss` of the state that the round began with.

    `sites` has each site's share: loss, eval_loss and weight (None where they are masked), and its seconds. With it
    `rounds_done` of the run's rounds have counted.
    """

    NAME = "round"
    round: int
    loss: float | None
    eval_loss: float | None
    sites: Mapping[str, Mapping[str, Any]]
    seconds: float | None = None
    saturated: int | None = None
    rounds_done: int | None = None


@dataclass(frozen=True, kw_only=True)
class LastStateEvaluated(Event):
    """The state that the last round led to was evaluated at all sites."""

    NAME = "last_evaluated"
    round: int
    eval_loss: float | None


@dataclass(frozen=True, kw_only=True)
class StoppedEarly(Event):
    NAME = "stopped_early"
    round: int

    @property
    def note(self) -> str:
        return f"stopped early after round {self.round}: the held-out loss falls no more"


@dataclass(frozen=True, kw_only=True)
class RoundsCompleted(Event):
    """A server's run, or a site's part in it, has completed its rounds."""

    NAME = "completed"
    round: int
    eval_loss: float | None


# Federated and gossip runs, at a site


@dataclass(frozen=True, kw_only=True)
class SliceTrained(Event):
    """A site has trained its slice of a round."""

    NAME = "trained"
    round: int
    loss: float
    eval_loss: float | None


@dataclass(frozen=True, kw_only=True)
class CaughtUp(Event):
    """A site's engine passed over rounds that it took no part in."""

    NAME = "caught_up"
    round: int
    engine_round: int


# Gossip runs, at a node


@dataclass(frozen=True, kw_only=True)
class NodeStarted(Event):
    NAME = "started"
    site: str
    run: str
    roster: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class NodeJoined(Event):
    """The node's trainer is ready; `manifest` and `initial` are digests that all nodes must have alike."""

    NAME = "joined"
    site: str
    run: str
    committed: int
    manifest: str
    initial: str


@dataclass(frozen=True, kw_only=True)
class WaitingForPeers(Event):
    NAME = "waiting"
    missing: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Gathered(Event):
    NAME = "gathered"
    live: Sequence[str]
    missing: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class OfPeer(Event):
    """An event that a peer can cause at any rate. `untold` are those of its kind and peer left out since the last."""

    peer: str | None
    untold: int = 0


@dataclass(frozen=True, kw_only=True)
class PeerUp(OfPeer):
    """A peer is there, or says that it has other records or processes than before."""

    NAME = "peer_up"
    peer: str
    committed: int
    train_examples: int = 0
    processes: int = 0


@dataclass(frozen=True, kw_only=True)
class PeerDown(OfPeer):
    NAME = "peer_down"
    peer: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class PeerRefused(OfPeer):
    """A peer trains something else."""

    NAME = "peer_refused"
    peer: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class InNodeRound(Event):
    """An event in a node's round. Its line has the number twice: earlier versions called it `epoch`."""

    round: int | None = None

    def document(self) -> dict[str, Any]:
        return {**super().document(), "epoch": self.round}


@dataclass(frozen=True, kw_only=True)
class Refused(OfPeer, InNodeRound):
    """A node did not take what a peer sent (None: what a group came to)."""

    NAME = "refused"
    peer: str | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class RefusedBy(OfPeer, InNodeRound):
    """A peer did not take this node's share."""

    NAME = "refused_by"
    peer: str
    round: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class UpdateNotTaken(OfPeer, InNodeRound):
    """A peer did not take this node's update."""

    NAME = "update_not_taken"
    peer: str
    round: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class TooFewMembers(InNodeRound):
    NAME = "too_few_members"
    round: int
    present: int
    needed: int


@dataclass(frozen=True, kw_only=True)
class GroupFormed(InNodeRound):
    NAME = "group_formed"
    round: int
    attempt: int
    members: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class GroupFailed(InNodeRound):
    NAME = "group_failed"
    round: int
    attempt: int
    member: str | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class GroupSum(InNodeRound):
    """A group opened its sum: values that were cut at their limit, and weights that were."""

    NAME = "group_sum"
    round: int
    attempt: int
    members: Sequence[str]
    masked: bool
    saturated: int
    capped: int


@dataclass(frozen=True, kw_only=True)
class NodeRound(InNodeRound):
    """A node has a round behind it, and the mean over `contributors`; the losses are its own.

    `rounds_done` of the rounds so far counted.
    """

    NAME = "epoch"
    round: int
    of: int
    loss: float | None
    eval_loss: float | None
    eval_weight: float
    weight: float
    seconds: float
    contributors: Sequence[str]
    live: Sequence[str]
    state_digest: str | None
    rounds_done: int | None = None


@dataclass(frozen=True, kw_only=True)
class NodeRoundVoid(NodeRound):
    """A node's round counted for nothing: too few members were there."""

    NAME = "epoch_void"

    @property
    def note(self) -> str:
        return f"round {self.round} is void and changed nothing: too few nodes came together"


@dataclass(frozen=True, kw_only=True)
class Adopted(InNodeRound):
    """A node that had fallen behind took the others' state."""

    NAME = "adopted"
    round: int
    of: int
    donors: Sequence[str]
    state_digest: str | None
    rounds_done: int | None = None


@dataclass(frozen=True, kw_only=True)
class NodeCompleted(Event):
    NAME = "run_completed"
    state_digest: str
    eval_loss: float | None


@dataclass(frozen=True, kw_only=True)
class HandingOut(Event):
    """A node that has completed stays for those who do not have the result yet."""

    NAME = "handing_out"
    late: Sequence[str]

    @property
    def note(self) -> str:
        return f"completed; stays to hand out the result to {', '.join(self.late)} (it can be stopped at any time)"


# Gossip runs, of a simulation


@dataclass(frozen=True, kw_only=True)
class SimulationStarted(Event):
    NAME = "started"
    rounds: int | None
    sites: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class SiteFailed(Event):
    """A node's site failed, and the others go on."""

    NAME = "site_failed"
    site: str
    reason: str

    @property
    def note(self) -> str:
        return f"{self.reason}; the others go on without it"


@dataclass(frozen=True, kw_only=True)
class SimulationCompleted(Event):
    NAME = "completed"
    rounds: int | None
    eval_loss: float | None


def read_event(line: Mapping[str, Any]) -> Event:
    """The event in a line of `events.jsonl`; `Unknown` where no kind of its name has such fields."""
    name = line.get("event")
    fields_of_line = {key: value for key, value in line.items() if key not in ("time", "event", "epoch")}
    if "epoch" in line:
        fields_of_line.setdefault("round", line["epoch"])
    for kind in _KINDS.get(name, ()) if isinstance(name, str) else ():
        own = {one.name for one in fields(kind)}
        values = {key: value for key, value in fields_of_line.items() if key in own}
        if "figures" in own:
            values["figures"] = {key: value for key, value in fields_of_line.items() if key not in own}
        with suppress(ValidationError):
            return _adapter(kind).validate_json(json.dumps(values), strict=True)
    return Unknown(line=line)


def _adapter(kind: type[Event]) -> TypeAdapter[Event]:
    if kind.__name__ not in _adapters:
        _adapters[kind.__name__] = TypeAdapter(kind)
    return _adapters[kind.__name__]


def _kinds() -> dict[str, list[type[Event]]]:
    """The kinds of each name, those with most fields first."""
    found: dict[str, list[type[Event]]] = {}
    waiting = [Event]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            waiting.append(kind)
            if kind.NAME:
                found.setdefault(kind.NAME, []).append(kind)
    return {name: sorted(kinds, key=lambda kind: -len(fields(kind))) for name, kinds in found.items()}


_KINDS = _kinds()
_adapters: dict[str, TypeAdapter[Event]] = {}
