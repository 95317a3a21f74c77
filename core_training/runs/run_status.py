"""The status of a run of any topology, put together from its events. Whoever shows a run begins here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from core_training.runs import events
from core_training.runs.events import Event


@dataclass(frozen=True)
class SiteFigures:
    """One site's share in the newest round it took part in. Losses are per token; masked ones are not known."""

    round: int
    loss: float | None
    eval_loss: float | None


@dataclass(frozen=True)
class Point:
    """The losses of a round (its number is `at`) with so many sites, or of an evaluation at step `at`."""

    at: int
    loss: float | None
    eval_loss: float | None
    sites: int = 1


@dataclass
class RunStatus:
    """`round` is the newest one, void or not; `curve` has the losses of those that brought any, by their number.

    `rounds_done` counted so far; `void_rounds` changed nothing, though a node may have held one of them again.
    `live` are the peers that a node hears of; `note` is the newest event, where a person should know of it.
    """

    state: str = "starting"
    round: int = 0
    sites: dict[str, SiteFigures] = field(default_factory=dict)
    curve: dict[int, Point] = field(default_factory=dict)
    live: dict[str, None] = field(default_factory=dict)
    quarantined: int = 0
    void_rounds: int = 0
    rounds_done: int = 0
    note: str | None = None
    of_node: bool = False
    """Whether it is a gossip node's, which shares its folder with its worker."""

    @property
    def newest(self) -> Point | None:
        """The losses that came last."""
        return next(reversed(self.curve.values()), None)

    def take(self, event: Event) -> None:
        """Add one event."""
        self.note = event.note
        match event:
            case (
                events.NodeStarted() | events.CentralStarted() | events.FederatedStarted() | events.SimulationStarted()
            ):
                self.live, self.state, self.of_node = {}, "starting", isinstance(event, events.NodeStarted)
            case events.WaitingForPeers(missing=missing):
                self.state = f"waiting for {', '.join(missing)}"
            case events.WaitingForSites() | events.SitesDisagree():
                self.state = "waiting"
            case events.PeerUp(peer=peer):
                self.live[peer] = None
            case events.PeerDown(peer=peer) | events.PeerRefused(peer=peer):
                self.live.pop(peer, None)
            case events.ResumedAtRound(round=number, rounds_done=int(counted)):
                self.round, self.rounds_done, self.void_rounds = number, counted, number - counted
                self.state = "training"
            case (
                events.Gathered()
                | events.ResumedAtStep()
                | events.ResumedAtRound()
                | events.StepsTrained()
                | events.StepsLogged()
            ):
                self.state = "training"
            case events.Round():
                self._note_round(event, len(event.sites))
                for name, share in event.sites.items():
                    self.sites[name] = SiteFigures(event.round, share.get("loss"), share.get("eval_loss"))
            case events.NodeRoundVoid():
                self.round, self.state = event.round, "training"
                self.void_rounds += 1
            case events.NodeRound():
                self._note_round(event)
            case events.Adopted():
                self.round = event.round
                self._note_done(event)
            case events.Rewound():
                self.round, self.rounds_done, self.state = event.round, event.rounds_done, "starting"
                self.void_rounds = event.round - event.rounds_done
                self.curve = {at: point for at, point in self.curve.items() if at <= event.round}
                self.sites = {name: site for name, site in self.sites.items() if site.round <= event.round}
            case events.RoundVoid():
                self.round, self.state = event.round, "training"
                self.void_rounds += 1
            case events.Evaluated():
                self.curve[event.step] = Point(event.step, None, event.loss)
            case events.Quarantined():
                self.quarantined += 1
            case events.Failed() | events.Interrupted():
                self.state = event.NAME
            case events.RoundsCompleted() if self.of_node:
                pass  # the node's own worker has evaluated its result; the node goes on for a while
            case (
                events.NodeCompleted()
                | events.CentralCompleted()
                | events.RoundsCompleted()
                | events.SimulationCompleted()
            ):
                self.state = "completed"

    def _note_round(self, event: events.Round | events.NodeRound, sites: int = 1) -> None:
        self.round, self.state = event.round, "training"
        self._note_done(event)
        self.curve.pop(event.round, None)  # a round that was taken back and held again came last
        self.curve[event.round] = Point(event.round, event.loss, event.eval_loss, sites)

    def _note_done(self, event: events.Round | events.NodeRound | events.Adopted) -> None:
        # Earlier versions did not say it, and every round had a number of its own.
        self.rounds_done = event.round - self.void_rounds if event.rounds_done is None else event.rounds_done


def fold(happened: Iterable[Event]) -> RunStatus:
    """The status of a run after these events."""
    status = RunStatus()
    for event in happened:
        status.take(event)
    return status
