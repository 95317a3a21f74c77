"""The server's round loop: orders out, updates in, one aggregate, a commit; then the next round.

Drives any Flower `Grid`: the real one of a SuperLink, the one in a simulation's own process, or Ray's. Flower carries
the messages and knows the nodes; which site a node is, what a reply may hold, and what survives a kill is decided here.
One bad reply is set aside with the site's true name and the reason, and the round goes on without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_training import __version__
from core_training.central import metrics_of
from core_training.errors import ProtocolError, RunError
from core_training.export import result_name, write_result
from core_training.recipe import Recipe, load_recipe
from core_training.run_folder import RunFolder, SiteSummary, Summary, peak_rss_bytes
from core_training.state import Manifest, TrainableState
from core_training.trainable import NOTHING_EVALUATED, EvalReport
from server.run_store import Progress, RunStore, SiteProgress
from strategies import AGGREGATION_RULES
from strategies.exchange import EvaluateOrder, EvaluateReply, JoinOrder, JoinReply, Message, TrainOrder, Update
from strategies.flower_records import from_message, to_message

if TYPE_CHECKING:
    from flwr.serverapp import Grid

POLL_SECONDS = 0.2
ATTEMPTS_PER_ROUND = 3


@dataclass(frozen=True)
class Terms:
    """What every site of the run agreed on when it joined."""

    manifest: Manifest
    initial_digest: str
    recipe_digest: str


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
        self._grid = grid
        self._folder = folder
        self._store = RunStore(folder)
        self._recipe = recipe
        self._topology = recipe.topology
        self._sites = sites
        self._on_round = on_round
        self._patience = 0.0 if in_process else recipe.topology.round_deadline
        # The sites' time in a round: the sum where they take turns, the slowest where they work side by side.
        self._of_all: Callable[[Iterable[float]], float] = sum if in_process else max
        self._run_id = folder.path.name
        self._progress = Progress()
        self._state: TrainableState | None = None
        self._terms: Terms | None = None
        self._layout: dict[str, str] = {}
        self._joined: dict[int, str] = {}
        self._turned_away: set[int] = set()

    def run(self) -> Summary:
        if (committed := self._store.latest()) is not None:
            self._progress, self._state = committed
            self._folder.event("resumed", round=self._progress.round)
        else:
            self._folder.event("started", rounds=self._topology.rounds)
        began = time.perf_counter() - self._progress.seconds_total
        rounds = self._topology.rounds or 0
        while self._progress.round < rounds and not self._should_stop_early():
            loss = self._round(self._progress.round + 1)
            self._progress.seconds_total = time.perf_counter() - began
            assert self._state is not None
            self._store.commit(self._progress, self._state)
            self._on_round(self._progress.round, loss)
        return self._finish(began)

    def _round(self, number: int) -> float | None:
        """One round, tried again while too few sites answer; returns the mean training loss."""
        for attempt in range(1, ATTEMPTS_PER_ROUND + 1):
            present = self._gather_sites()
            assert self._terms is not None
            rule = AGGREGATION_RULES[self._recipe.aggregation.rule]
            aggregator = _load(rule)(self._terms.manifest)
            evaluate = number == 1 or (number - 1) % self._topology.eval_every == 0
            order = TrainOrder(
                run_id=self._run_id,
                round=number,
                steps=self._topology.local_steps or 0,
                evaluate=evaluate,
                manifest_digest=self._terms.manifest.digest,
                payload=self._state.to_bytes() if self._state is not None else b"",
            )
            began = time.perf_counter()
            accepted: dict[str, Update] = {}
            for site, update, size in self._exchange(order, present, Update):
                with self._quarantine(site, number):
                    if update.round != number or update.manifest_digest != self._terms.manifest.digest:
                        raise ProtocolError(f"the update is of round {update.round} or of another manifest")
                    aggregator.add(TrainableState.from_bytes(update.payload, self._terms.manifest), update.weight)
                    self._progress.bytes_up += size
                    accepted[site] = update.model_copy(update={"payload": b""})
            if len(accepted) >= max(1, self._topology.minimum_sites):
                self._state = aggregator.result()
                return self._record_round(number, accepted, time.perf_counter() - began)
            self._folder.event("void", round=number, attempt=attempt, sites=sorted(accepted))
        raise RunError(
            f"round {number}: fewer than {self._topology.minimum_sites} sites answered in {ATTEMPTS_PER_ROUND} attempts; "
            f"round {self._progress.round} is committed, and the run can go on from it"
        )

    def _record_round(self, number: int, accepted: dict[str, Update], seconds: float) -> float:
        """Put a round's figures into the progress and the events; returns the mean training loss."""
        progress = self._progress
        weight = sum(update.weight for update in accepted.values())

        def mean(loss: Callable[[Update], float]) -> float:
            return sum(loss(update) * update.weight for update in accepted.values()) / weight

        if progress.train_loss_first is None:
            progress.train_loss_first = mean(lambda update: update.train.loss_first)
        progress.train_loss_last = mean(lambda update: update.train.loss_last)
        evaluations = {site: update.evaluation for site, update in accepted.items() if update.evaluation is not None}
        pooled = sum(evaluations.values(), start=NOTHING_EVALUATED)
        if evaluations:
            self._note_evaluations(evaluations, number == 1)
        progress.round = number
        progress.tokens += sum(update.train.loss_tokens for update in accepted.values())
        progress.seconds_training += self._of_all(update.train.seconds for update in accepted.values())
        progress.seconds_exchange += seconds - self._of_all(update.seconds for update in accepted.values())
        for site in accepted:
            progress.sites[site].rounds += 1
        loss = mean(lambda update: update.train.loss_mean)
        self._folder.event(
            "round",
            round=number,
            loss=loss,
            eval_loss=pooled.loss,  # of the state the round began with
            seconds=seconds,
            sites={
                site: {
                    "loss": update.train.loss_mean,
                    "eval_loss": update.evaluation.loss if update.evaluation else None,
                    "weight": update.weight,
                    "seconds": update.train.seconds,
                    "resident_seconds": update.resident_seconds,
                }
                for site, update in sorted(accepted.items())
            },
        )
        return loss

    def _note_evaluations(self, evaluations: dict[str, EvalReport], first: bool) -> float | None:
        progress = self._progress
        loss = sum(evaluations.values(), start=NOTHING_EVALUATED).loss
        for site, report in evaluations.items():
            progress.sites[site].eval_loss = report.loss
            if first:
                progress.sites[site].eval_loss_initial = report.loss
        if first:
            progress.eval_loss_initial = loss
        if loss is not None and (progress.best_eval_loss is None or loss < progress.best_eval_loss):
            progress.best_eval_loss = loss
            progress.evaluations_without_gain = 0
        else:
            progress.evaluations_without_gain += 1
        return loss

    def _should_stop_early(self) -> bool:
        patience = self._topology.early_stopping_patience
        if patience is None or self._progress.evaluations_without_gain < patience:
            return False
        self._folder.event("stopped_early", round=self._progress.round)
        return True

    def _finish(self, began: float) -> Summary:
        """Have the result evaluated and kept by every site, and write the run folder's last files."""
        present = self._gather_sites()
        assert self._state is not None
        assert self._terms is not None
        progress = self._progress
        order = EvaluateOrder(
            run_id=self._run_id,
            round=progress.round,
            final=True,
            manifest_digest=self._terms.manifest.digest,
            payload=self._state.to_bytes(),
        )
        evaluations = {}
        for site, reply, _ in self._exchange(order, present, EvaluateReply):
            evaluations[site] = reply.evaluation
        self._note_evaluations(evaluations, first=False)
        progress.seconds_total = time.perf_counter() - began
        pooled = sum(evaluations.values(), start=NOTHING_EVALUATED)
        write_result(self._state, self._layout, self._folder.path / result_name(self._recipe))
        summary = Summary(
            topology=self._topology.kind,
            stage=self._recipe.stage,
            tuning=self._recipe.tuning.mode,
            status="completed",
            rounds=progress.round,
            trainable_parameters=self._terms.manifest.size,
            state_digest=self._state.digest,
            train_loss_first=progress.train_loss_first,
            train_loss_last=progress.train_loss_last,
            eval_loss_initial=progress.eval_loss_initial,
            eval_loss=pooled.loss,
            metrics=metrics_of(pooled),
            bytes_up=progress.bytes_up,
            bytes_down=progress.bytes_down,
            seconds={
                "total": progress.seconds_total,
                "training": progress.seconds_training,
                "exchange": progress.seconds_exchange,
            },
            tokens_trained=progress.tokens,
            peak_rss_bytes=peak_rss_bytes(),
            sites={
                name: SiteSummary(
                    train_examples=site.train_examples,
                    eval_examples=site.eval_examples,
                    eval_loss_initial=site.eval_loss_initial,
                    eval_loss=site.eval_loss,
                    rounds=site.rounds,
                )
                for name, site in sorted(progress.sites.items())
            },
        )
        self._folder.write_summary(summary)
        self._folder.event("completed", round=progress.round, eval_loss=pooled.loss)
        return summary

    def _gather_sites(self) -> dict[int, str]:
        """The joined sites that are connected now; waits for the minimum, and lets newcomers join."""
        deadline = time.monotonic() + self._patience
        announced = False
        while True:
            connected = set(self._grid.get_node_ids())
            self._turned_away &= connected  # whoever reconnects is asked again
            known = self._sites()
            newcomers = {
                n: known[n] for n in connected & known.keys() if n not in self._joined.keys() | self._turned_away
            }
            for stranger in connected - known.keys() - self._turned_away:
                self._turned_away.add(stranger)
                self._folder.event(
                    "quarantined", site=f"node {stranger}", reason="the node is none of the admitted sites"
                )
            if newcomers:
                self._let_join(newcomers)
            present = {
                node: site for node, site in sorted(self._joined.items(), key=lambda i: i[1]) if node in connected
            }
            if len(present) >= max(1, self._topology.minimum_sites):
                return present
            if time.monotonic() > deadline:
                reasons = [f"{e['site']}: {e['reason']}" for e in self._folder.events("quarantined")][-3:]
                raise RunError(
                    f"{len(present)} of at least {self._topology.minimum_sites} sites were ready within "
                    f"{self._patience:g} s (topology.round_deadline). " + "; ".join(reasons)
                )
            if not announced:
                self._folder.event("waiting", sites=sorted(present.values()), minimum=self._topology.minimum_sites)
                announced = True
            time.sleep(POLL_SECONDS)

    def _let_join(self, newcomers: dict[int, str]) -> None:
        """Invite sites; the terms are those of the commit, else those of most sites that answer."""
        order = JoinOrder(run_id=self._run_id, version=__version__, recipe=self._recipe.to_yaml())
        nodes = {site: node for node, site in newcomers.items()}
        offers: dict[str, tuple[JoinReply, Terms]] = {}
        for site, reply, _ in self._exchange(order, newcomers, JoinReply):
            with self._quarantine(site, self._progress.round):
                if reply.version != __version__:
                    raise ProtocolError(f"the site runs fedloom {reply.version}, this server {__version__}")
                offers[site] = (reply, Terms(reply.parsed_manifest, reply.initial_digest, reply.recipe_digest))
        for site in newcomers.values():
            if site not in offers:  # it answered badly or not at all; asked again when it reconnects
                self._turned_away.add(nodes[site])
        if self._terms is None and offers:
            votes = [terms for _, terms in offers.values()]
            if self._state is not None:
                votes = [terms for terms in votes if terms.manifest == self._state.manifest]
            self._terms = max(votes, key=votes.count, default=None)
        for site, (reply, terms) in sorted(offers.items()):
            with self._quarantine(site, self._progress.round):
                if self._terms is None or terms != self._terms:
                    raise ProtocolError(_difference(terms, self._terms))
                self._layout = self._layout or dict(reply.layout)
                self._joined[nodes[site]] = site
                self._progress.sites.setdefault(site, SiteProgress(reply.data.train_examples, reply.data.eval_examples))
                self._folder.event("joined", site=site, train_examples=reply.data.train_examples)

    def _exchange(self, order: Message, to: dict[int, str], reply: type[Any]) -> Iterator[tuple[str, Any, int]]:
        """Send an order to sites and yield (site, checked reply, payload bytes) as they come, until the deadline.

        Each message is matched by its own id: Flower may report a failure under the wrong node.
        """
        round_number = self._progress.round + 1
        envelope = order.envelope()
        deadline = time.monotonic() + self._topology.round_deadline
        messages = [to_message(envelope, node, ttl=self._topology.round_deadline) for node in to]
        waiting = dict(zip(self._grid.push_messages(messages), to.values(), strict=True))
        self._progress.bytes_down += len(envelope.payload) * len(to)
        del messages
        while waiting and time.monotonic() < deadline:
            arrived = False
            for message in self._grid.pull_messages(list(waiting)):
                arrived = True
                site = waiting.pop(message.metadata.reply_to_message_id, None)
                if site is None:
                    continue
                with self._quarantine(site, round_number):
                    answer = reply.open(from_message(message))
                    if answer.run_id != self._run_id:
                        raise ProtocolError(f"the reply belongs to run {answer.run_id}")
                    yield site, answer, len(answer.payload)
            if waiting and not arrived:
                time.sleep(POLL_SECONDS)
        for site in waiting.values():
            self._folder.event("late", site=site, round=round_number, order=envelope.kind)

    def _quarantine(self, site: str, round_number: int) -> _Quarantine:
        return _Quarantine(self._folder, site, round_number)


class _Quarantine:
    """Sets a reply aside: a ProtocolError inside the block becomes an event with the site's name and the reason."""

    def __init__(self, folder: RunFolder, site: str, round_number: int) -> None:
        self._folder = folder
        self._site = site
        self._round = round_number

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, ProtocolError):
            return False
        self._folder.event("quarantined", site=self._site, round=self._round, reason=str(error))
        return True


def _difference(offered: Terms, agreed: Terms | None) -> str:
    if agreed is None or offered.manifest != agreed.manifest:
        return "the site's trainable tensors differ from the run's: another base model or another recipe"
    if offered.recipe_digest != agreed.recipe_digest:
        return "the site reads the recipe differently than the others"
    return "the site starts from other values than the others: its base model has other weights"


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
