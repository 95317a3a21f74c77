"""The points of a run at which faults strike, by what its files tell. The second of two rounds is hit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.faults.federation import FederatedRun
from tests.faults.gossip import GossipRun
from tests.faults.world import Run

HIT = 2
"""The round that is hit: there is a commit to go back to, and the run's end is near."""


@dataclass(frozen=True)
class Point:
    """`begun` as soon as the point is reached, `passed` when a fault would come too late to strike at it."""

    name: str
    says: str
    begun: Callable[[Run], bool]
    passed: Callable[[Run], bool]


def _federated(
    name: str, says: str, begun: Callable[[FederatedRun], bool], passed: Callable[[FederatedRun], bool]
) -> Point:
    return Point(name, says, begun, passed)  # type: ignore[arg-type]


def _gossip(name: str, says: str, begun: Callable[[GossipRun], bool], passed: Callable[[GossipRun], bool]) -> Point:
    return Point(name, says, begun, passed)  # type: ignore[arg-type]


def _has_masked(run: FederatedRun) -> bool:
    masked = run.masks().get("masked")
    return masked is not None and bool(masked["attempt"]["round"] == HIT)


def _has_helped(run: FederatedRun) -> bool:
    return _has_masked(run) and run.masks().get("unmasked") is not None


FEDERATED = {
    point.name: point
    for point in (
        _federated(
            "joining",
            "the sites are asked what they would train; nothing is committed",
            lambda run: run.at_server("started"),
            lambda run: run.at_server("joined", count=3),
        ),
        _federated(
            "masking",
            "north has made the keys of its masks; not all masks are set up",
            lambda run: run.masks().get("keys") is not None,
            lambda run: run.at_server("masks_set_up"),
        ),
        _federated(
            "between",
            "round 1 is committed, and no step of round 2 is taken",
            lambda run: run.has_committed(1),
            lambda run: run.at_north("logged", HIT),
        ),
        _federated(
            "training",
            "north has taken the first steps of round 2 and not the last",
            lambda run: run.at_north("logged", HIT),
            lambda run: run.at_north("trained", HIT),
        ),
        _federated(
            "uploading",
            "north has trained; its update is on its way",
            lambda run: run.at_north("trained", HIT),
            lambda run: run.at_server("round", HIT) or _has_helped(run),
        ),
        _federated(
            "opening",
            "north has helped to open the sum, and the server has not told the round",
            _has_helped,
            lambda run: run.at_server("round", HIT) or run.at_server("round_void", HIT),
        ),
        _federated(
            "committing",
            "the server has the mean of round 2, and commits it",
            lambda run: run.at_server("round", HIT),
            lambda run: run.at_server("last_evaluated"),
        ),
        _federated(
            "evaluating",
            "the last round is committed, and the sites evaluate the result",
            lambda run: run.has_committed(HIT),
            lambda run: run.at_server("last_evaluated"),
        ),
        _federated(
            "ending",
            "all have evaluated; the server writes the result",
            lambda run: run.at_server("last_evaluated"),
            lambda run: False,
        ),
    )
}
"""Points of a run over a server."""

GOSSIP = {
    point.name: point
    for point in (
        _gossip(
            "joining",
            "alpha listens, and has not heard from all others",
            lambda run: run.tells("started"),
            lambda run: run.tells("gathered"),
        ),
        _gossip(
            "training",
            "alpha has taken the first steps of round 2 and not the last",
            lambda run: run.tells("logged", HIT),
            lambda run: run.tells("trained", HIT),
        ),
        _gossip(
            "exchanging",
            "alpha has trained, and updates are on their way",
            lambda run: run.tells("trained", HIT),
            lambda run: run.has_begun_to_commit(HIT),
        ),
        _gossip(
            "grouping",
            "a group of round 2 has formed, and its sum is not opened",
            lambda run: run.tells("group_formed", HIT),
            lambda run: run.tells("group_sum", HIT),
        ),
        _gossip(
            "opening",
            "alpha has opened the sum of round 2, and has not told the round",
            lambda run: run.tells("group_sum", HIT),
            lambda run: run.tells("epoch", HIT),
        ),
        _gossip(
            "committing",
            "alpha commits round 2",
            lambda run: run.has_begun_to_commit(HIT),
            lambda run: run.tells("run_completed"),
        ),
        _gossip(
            "evaluating",
            "the last round is committed, and alpha evaluates the result",
            lambda run: run.tells("epoch", HIT),
            lambda run: run.tells("run_completed"),
        ),
        _gossip(
            "ending",
            "alpha has the result, and hands it out",
            lambda run: run.tells("run_completed"),
            lambda run: False,
        ),
    )
}
"""Points of a run among gossip nodes."""
