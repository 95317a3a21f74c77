"""What a terminal shows of a gossip node's events while it takes part in a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import typer

from core_training.runs import events
from fedloom.console import Ticker

_SHOWN = (
    events.WaitingForPeers,
    events.PeerUp,
    events.PeerDown,
    events.PeerRefused,
    events.Refused,
    events.TooFewMembers,
    events.StoppedEarly,
    events.BestChosen,
)
"""The events that a terminal shows besides rounds."""


def terminal_listener(ticker: Ticker, *, quiet: bool) -> Callable[[events.Event], None]:
    """A listener that advances `ticker` with each round and writes what else there is to say to standard error."""

    def show(line: str) -> None:
        if not quiet:
            typer.echo(line, err=True)

    def listener(event: events.Event) -> None:
        match event:
            case events.NodeRoundVoid() | events.HandingOut():
                show(event.note)
            case events.NodeRound():
                loss = f"loss {event.loss:.4f}, " if event.loss is not None else ""
                words = f"{loss}mean over {', '.join(event.contributors)}"
                ticker.advance(event.rounds_done or event.round, event.of, words)
            case events.Adopted():
                words = f"caught up, state from {', '.join(event.donors)}"
                ticker.advance(event.rounds_done or event.round, event.of, words)
            case _ if isinstance(event, _SHOWN):
                show(in_one_line(event))

    return listener


def in_one_line(event: events.Event) -> str:
    """An event in one line: what happened, then its fields."""
    fields = {key: value for key, value in asdict(event).items() if value is not None}
    if not fields.get("untold"):
        fields.pop("untold", None)
    return f"{event.NAME}: {', '.join(f'{key} {value}' for key, value in fields.items())}"
