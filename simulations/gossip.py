"""Many gossip nodes in one process: the real nodes, over a network in memory, on a clock that does not wait.

Knows nothing of models: each site's orders are answered by an `Ask` that the caller gives.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial

from core_training.foundation.errors import FedloomError, ProtocolError, RunError, VoidRoundsError
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.figures import summary_of_void_rounds
from core_training.runs.run_folder import RunFolder, Summary
from core_training.runs.trackers import reporting
from p2p.ledger import NodeResult, summarize
from p2p.node import take_part
from p2p.plan import RunPlan
from p2p.service import PeerService
from p2p.site_orders import Ask
from simulations.network import SimulatedNetwork
from simulations.virtual_time import VirtualTimeLoop, run_virtually
from strategies.messages import Envelope, TrainOrder

RUN_ID = "simulation"
ROUND_SECONDS = 30.0
"""The seconds of a round's training at a site, on the network's clock, unless the caller says otherwise."""

_LINGER_SECONDS = 600.0
"""The seconds, on the network's clock, that a node stays at the end for those who are late."""


def simulate_gossip(
    recipe: Recipe,
    sites: Mapping[str, Ask],
    folder: RunFolder,
    network: SimulatedNetwork | None = None,
    round_seconds: Mapping[str, float] | None = None,
    on_round: Callable[[int, float | None], None] = lambda *_: None,
) -> Summary:
    """Run one node for each site until all have finished, and sum up over all of them.

    `round_seconds` says how long the sites take to train a round on the network's clock, whatever they take in truth.
    `on_round(number, mean training loss)` follows each round that all nodes have behind them.

    The nodes' own files are in `sites/<name>/` of the run folder. Going on after an interruption is calling this again.
    """
    network = network or SimulatedNetwork(recipe.training.seed)
    rounds = _Rounds(folder, list(sites), on_round, held_again=recipe.privacy.ring_bits is None)
    with reporting(recipe, folder, since=max((row["round"] for row in folder.curve()), default=0)):
        return run_virtually(_simulate(recipe, sites, folder, network, round_seconds or {}, rounds))


class _Turns:
    """The sites' turns: one works at a time, on a clock that stands still meanwhile; the seconds are added up."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self.seconds = 0.0

    def of(self, ask: Ask, round_seconds: float) -> Ask:
        async def in_turn(order: Envelope) -> Envelope:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualTimeLoop)
            with loop.hold():
                async with self._turn:
                    began = time.perf_counter()
                    reply = await ask(order)
                    self.seconds += time.perf_counter() - began
            if order.kind == TrainOrder.kind:
                await asyncio.sleep(round_seconds)
            return reply

        return in_turn


class _Rounds:
    """The nodes' rounds put together: one event of the simulation for each that all nodes have finished."""

    def __init__(
        self, folder: RunFolder, sites: list[str], on_round: Callable[[int, float | None], None], *, held_again: bool
    ) -> None:
        """`held_again`: a round that was void at a node is held again under its number, until it counts."""
        self._folder = folder
        self._on_round = on_round
        self._held_again = held_again
        self._reached = dict.fromkeys(sites, 0)
        self._joined: set[str] = set()
        self._rounds: dict[int, dict[str, events.NodeRound]] = {}

    def has_begun(self, site: str) -> bool:
        """Whether a site has joined the run."""
        return site in self._joined

    def leave(self, site: str) -> None:
        """Wait no longer for a site."""
        self._reached.pop(site, None)
        self._report()

    def note(self, site: str, event: events.Event) -> None:
        """The listener of one node's events."""
        match event:
            case events.NodeJoined():
                self._joined.add(site)
                self._reached[site] = event.committed
            case events.Adopted():
                self._reached[site] = event.round
            case events.NodeCompleted():  # it may have stopped before the others
                self._reached.pop(site, None)
            case events.NodeRoundVoid():
                if not self._held_again:
                    self._reached[site] = event.round
                    self._rounds.setdefault(event.round, {})
            case events.NodeRound():
                self._reached[site] = event.round
                self._rounds.setdefault(event.round, {})[site] = event
        self._report()

    def _report(self) -> None:
        behind_all = min(self._reached.values(), default=0)
        for number in [number for number in sorted(self._rounds) if number <= behind_all]:
            self._tell(number, self._rounds.pop(number))

    def _tell(self, number: int, sites: dict[str, events.NodeRound]) -> None:
        if not sites:
            self._folder.event(events.RoundVoid(round=number, reason="too few nodes came together"))
            self._on_round(number, None)
            return
        loss = _mean((one.loss, one.weight) for one in sites.values())
        held_out = [(one.eval_loss, one.eval_weight) for one in sites.values() if one.eval_loss is not None]
        shares = {
            name: {"loss": o.loss, "eval_loss": o.eval_loss, "weight": o.weight, "contributors": o.contributors}
            for name, o in sorted(sites.items())
        }
        done = max((one.rounds_done or 0 for one in sites.values()), default=0)
        self._folder.event(
            events.Round(round=number, loss=loss, eval_loss=_mean(held_out), sites=shares, rounds_done=done)
        )
        self._on_round(number, loss)


def _mean(values: Iterable[tuple[float | None, float]]) -> float | None:
    known = [(value, share) for value, share in values if value is not None]
    weight = sum(share for _, share in known)
    return sum(value * share for value, share in known) / weight if weight else None


async def _simulate(
    recipe: Recipe,
    sites: Mapping[str, Ask],
    folder: RunFolder,
    network: SimulatedNetwork,
    round_seconds: Mapping[str, float],
    rounds: _Rounds,
) -> Summary:
    began, turns, nodes, failed = time.perf_counter(), _Turns(), [], set[str]()

    async def until_it_fails(plan: RunPlan, node: Awaitable[NodeResult]) -> NodeResult | None:
        """Run a node; as on a real network, the others go on when its site fails."""
        name = plan.name
        try:
            return await node
        except (RunError, ProtocolError) as error:
            failed.add(name)
            # Before it has begun nothing is lost yet, and what is wrong is to be mended first.
            if not rounds.has_begun(name) or len(sites) - len(failed) < plan.needed:
                raise
            network.detach(name)
            rounds.leave(name)
            folder.event(events.SiteFailed(site=name, reason=str(error)))
            return None

    for name, ask in sites.items():
        # Rounded by its name, a site writes what a simulated server would get of it.
        plan = RunPlan(name, tuple(sites), RUN_ID, recipe, rounding_secret=name)
        in_turn = turns.of(ask, round_seconds.get(name, ROUND_SECONDS))
        node_folder = RunFolder(folder.path / "sites" / name, partial(rounds.note, name))
        service = PeerService()
        network.attach(name, service)
        node = take_part(plan, service, network.transport(name), in_turn, node_folder, _LINGER_SECONDS)
        nodes.append(until_it_fails(plan, node))
    folder.event(events.SimulationStarted(rounds=recipe.topology.rounds, sites=list(sites)))
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(node) for node in nodes]
    except* FedloomError as errors:
        error = errors.exceptions[0]
        if isinstance(error, VoidRoundsError):
            folder.write_summary(summary_of_void_rounds(recipe, error))
        raise error from None
    results = [result for task in running if (result := task.result()) is not None]
    summary = summarize(recipe, results)
    # The nodes' own seconds are virtual: what the exchange really took is what the sites did not.
    total = time.perf_counter() - began
    summary.seconds |= {"total": total, "training": turns.seconds, "exchange": total - turns.seconds}
    last = max(result.last_round for result in results)
    if summary.rounds is not None and summary.rounds < (recipe.topology.rounds or 0):
        folder.event(events.StoppedEarly(round=last))
    if not recipe.training.load_best_model_at_end:
        folder.event(events.LastStateEvaluated(round=last, eval_loss=summary.eval_loss))
    folder.write_summary(summary)
    folder.event(events.SimulationCompleted(rounds=summary.rounds, eval_loss=summary.eval_loss))
    return summary
