"""The server's round loop: orders out, updates in, one aggregate, a commit; then the next round.

Drives any Flower `Grid`: the real one of a SuperLink, the one in a simulation's own process, or Ray's. Flower carries
the messages and knows the nodes; which site a node is, what a reply may hold, and what survives a kill is decided here.
One bad reply is set aside with the site's true name and the reason, and the round goes on without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from core_training.errors import ProtocolError, RunError
from core_training.models.export import result_name, write_result
from core_training.recipe import Recipe
from core_training.recipe_file import load_recipe
from core_training.run_folder import RunFolder, Summary
from core_training.state import TrainableState
from core_training.trainable import EvalReport
from server.attendance import Attendance
from server.order_exchange import OrderExchange
from server.progress import Progress
from server.run_store import RunStore
from strategies import AGGREGATION_RULES
from strategies.exchange import EvaluateOrder, EvaluateReply, TrainOrder, Update
from strategies.fedavg import most_weight

if TYPE_CHECKING:
    from flwr.serverapp import Grid

ATTEMPTS_PER_ROUND = 3

_Kept = TypeVar("_Kept")
_Rest = TypeVar("_Rest")


def run_federation(
    grid: Grid,
    run_dir: Path,
    sites: Callable[[], dict[int, str]],
    on_round: Callable[[int, float | None], None] = lambda *_: None,
    in_process: bool = False,
) -> Summary:
    """Run, or go on with, the federated run whose recipe lies in `run_dir`; returns when it has completed.

    `sites()` maps the node ids that may take part to the sites' names; `on_round(round, loss)` follows each commit.
    `in_process` is a simulation: the sites train in turn, and as nobody comes later, too few sites end the run at once.
    Raises RunError when too few sites answer; the last commit stays, and a later call goes on from it.
    """
    return _RoundLoop(grid, RunFolder(run_dir), load_recipe(run_dir / "recipe.yaml"), sites, on_round, in_process).run()


class _RoundLoop:
    def __init__(
        self,
        grid: Grid,
        folder: RunFolder,
        recipe: Recipe,
        sites: Callable[[], dict[int, str]],
        on_round: Callable[[int, float | None], None],
        in_process: bool,
    ) -> None:
        self._folder = folder
        self._recipe = recipe
        self._topology = recipe.topology
        self._on_round = on_round
        self._of_all: Callable[[Iterable[float]], float] = sum if in_process else max
        self._store = RunStore(folder)
        self._exchange = OrderExchange(grid, folder, recipe.topology.round_deadline)
        patience = 0.0 if in_process else recipe.topology.round_deadline
        self._attendance = Attendance(grid, folder, recipe, self._exchange, sites, patience)
        self._progress = Progress()
        self._state: TrainableState | None = None

    @property
    def _minimum(self) -> int:
        return self._topology.minimum_sites

    def run(self) -> Summary:
        if (committed := self._store.latest()) is not None:
            self._progress, self._state = committed
            self._folder.event("resumed", round=self._progress.round)
        else:
            self._folder.event("started", rounds=self._topology.rounds)
        began = time.perf_counter() - self._progress.seconds_total
        rounds = self._topology.rounds or 0
        while self._progress.round < rounds and not self._should_stop_early():
            updates, self._state, seconds = self._round(self._progress.round + 1)
            figures = self._progress.record_round(self._progress.round + 1, updates, seconds, self._of_all)
            self._note_time_and_bytes(began)
            self._folder.event("round", **figures)
            self._store.commit(self._progress, self._state)
            self._on_round(self._progress.round, figures["loss"])
        return self._finish(began)

    def _round(self, number: int) -> tuple[dict[str, Update], TrainableState, float]:
        """One round: the updates without their states, the aggregate, and the seconds of the attempt that counted."""

        def attempt(present: dict[int, str]) -> tuple[dict[str, Update], tuple[Any, float]]:
            manifest = self._attendance.terms.manifest
            aggregator = _load(AGGREGATION_RULES[self._recipe.aggregation.rule])(manifest)
            order = TrainOrder(
                run_id=self._folder.run_id,
                round=number,
                steps=self._topology.local_steps or 0,
                evaluate=(number - 1) % self._topology.eval_every == 0,
                manifest_digest=manifest.digest,
                payload=self._state.to_bytes() if self._state is not None else b"",
            )
            began = time.perf_counter()
            accepted: dict[str, Update] = {}
            for site, update in self._exchange.ask(order, present, Update, number):
                with self._exchange.quarantine(site, number):
                    self._check(update, order)
                    aggregator.add(TrainableState.from_bytes(update.payload, manifest), update.weight)
                    self._progress.bytes_up += len(update.payload)
                    accepted[site] = update.model_copy(update={"payload": b""})
                del update  # its tensors, before the next ones are fetched
            return accepted, (aggregator, began)

        updates, (aggregator, began) = self._until_enough(f"round {number}", number, attempt)
        state = aggregator.result()
        return updates, state, time.perf_counter() - began

    def _until_enough(
        self, what: str, number: int, attempt: Callable[[dict[int, str]], tuple[dict[str, _Kept], _Rest]]
    ) -> tuple[dict[str, _Kept], _Rest]:
        """What the present sites answer to `attempt` (and the rest it makes); tried again while too few do.

        Raises RunError when they are too few each time.
        """
        for count in range(1, ATTEMPTS_PER_ROUND + 1):
            accepted, rest = attempt(self._attendance.gather(self._progress, self._state))
            if len(accepted) >= self._minimum:
                return accepted, rest
            self._folder.event("void", round=number, attempt=count, sites=sorted(accepted))
        raise RunError(
            f"{what}: fewer than {self._minimum} sites answered in {ATTEMPTS_PER_ROUND} attempts; "
            f"round {self._progress.round} is committed, and the run can go on from it"
        )

    def _finish(self, began: float) -> Summary:
        """Have the result evaluated and kept by every site, and write the run folder's last files."""
        state, number = self._state, self._progress.round
        assert state is not None, "a recipe has at least one round"

        def attempt(present: dict[int, str]) -> tuple[dict[str, EvalReport], None]:
            order = EvaluateOrder(
                run_id=self._folder.run_id,
                round=number,
                final=True,
                manifest_digest=self._attendance.terms.manifest.digest,
                payload=state.to_bytes(),
            )
            accepted: dict[str, EvalReport] = {}
            for site, reply in self._exchange.ask(order, present, EvaluateReply, number):
                with self._exchange.quarantine(site, number):
                    _check_belongs(reply, order)
                    accepted[site] = reply.evaluation
            return accepted, None

        final, _ = self._until_enough("the final evaluation", number, attempt)
        self._progress.note_evaluations(final)
        for site in self._progress.sites.keys() - final.keys():
            self._progress.sites[site].eval_loss = None  # the loss it has is of an earlier state
        self._note_time_and_bytes(began)
        write_result(state, self._attendance.layout, self._folder.path / result_name(self._recipe, without_base=True))
        summary = self._progress.summary(self._recipe, state, final)
        self._folder.write_summary(summary)
        self._folder.event("completed", round=number, eval_loss=summary.eval_loss)
        return summary

    def _check(self, update: Update, order: TrainOrder) -> None:
        _check_belongs(update, order)
        if update.manifest_digest != order.manifest_digest:
            raise ProtocolError("the update has another manifest than the run")
        if update.weight != update.train.weight:
            raise ProtocolError(f"weight {update.weight} is not that of its report, {update.train.weight}")
        if update.weight > (most := most_weight(self._recipe, order.steps)):
            raise ProtocolError(f"weight {update.weight} is more than {order.steps} steps can have, {most}")

    def _should_stop_early(self) -> bool:
        patience = self._topology.early_stopping_patience
        if patience is None or self._progress.evaluations_without_gain < patience:
            return False
        self._folder.event("stopped_early", round=self._progress.round)
        return True

    def _note_time_and_bytes(self, began: float) -> None:
        self._progress.seconds_total = time.perf_counter() - began
        self._progress.bytes_down += self._exchange.bytes_down
        self._exchange.bytes_down = 0


def _check_belongs(reply: Update | EvaluateReply, order: TrainOrder | EvaluateOrder) -> None:
    if reply.run_id != order.run_id:
        raise ProtocolError(f"the reply belongs to run {reply.run_id}")
    if reply.round != order.round:
        raise ProtocolError(f"the reply is of round {reply.round}")


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
