"""The server's round loop: orders out, updates in, one aggregate, a commit; then the next round.

Drives any `Grid`: the real one of a SuperLink, the one in a simulation's own process, or Ray's. Flower carries
the messages and knows the nodes; which site a node is, what a reply may hold, and what survives a kill is decided here.
One bad reply is set aside with the site's true name and the reason, and the round goes on without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from core_training.foundation.errors import ProtocolError, RunError, VoidRoundsError
from core_training.foundation.state import TrainableState
from core_training.foundation.trainable import EvalReport, total
from core_training.recipe.reading import load_recipe
from core_training.recipe.recipe_keys import MOST_VOID_IN_A_ROW
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.checkpoints import keep_best, prune_best, read_best
from core_training.runs.figures import summary_of_void_rounds
from core_training.runs.result_format import result_folder, write_result
from core_training.runs.run_folder import RunFolder, Summary
from core_training.runs.trackers import reporting
from flower_transport.grid import Grid
from server.aggregation import ClearRounds, Outcome, RoundAggregation, Rounds, check_belongs
from server.asynchronous_rounds import AsynchronousRounds
from server.buffered_rounds import BufferedRounds
from server.cohort_rounds import CohortRounds
from server.group_rounds import ClearGroups, Grouping, GroupRounds
from server.mask_exchange import MaskExchange
from server.membership import Membership, Participants
from server.order_exchange import OrderExchange
from server.progress import Progress
from server.run_store import RunStore
from server.secure_groups import SecureGroups
from server.secure_rounds import SecureRounds
from strategies.adapter_sharing import keeps_own, remade
from strategies.bounds import change_norm, check_evaluation
from strategies.messages import (
    EvaluateOrder,
    EvaluateReply,
    InitialStateOrder,
    InitialStateReply,
    Message,
    RingTerms,
    TrainOrder,
)
from strategies.outer_steps.outer_step import CountingStep, Memory, OuterStep, ScaledStep, outer_step_of, take_step
from strategies.participation import drawn, wanted_sites
from strategies.ring_scale import Scale, first_scale, widened

ATTEMPTS_PER_ROUND = 3

_Result = TypeVar("_Result")


class TooFewSites(Exception):
    """An attempt came to nothing for want of answers; `sites` did answer. It can be repeated."""

    def __init__(self, sites: Collection[str], reason: str) -> None:
        super().__init__(reason)
        self.sites = sites


class RoundVoid(Exception):
    """A masked round whose sum cannot be opened. It changes nothing, and the run goes on with the next one."""


def run_federation(
    grid: Grid,
    run_dir: Path,
    sites: Callable[[], dict[int, str]],
    on_round: Callable[[int, float | None], None] = lambda *_: None,
    *,
    in_process: bool = False,
    roster_of: Callable[[str], Mapping[str, str]] = lambda _: {},
) -> Summary:
    """Run, or go on with, the federated run whose recipe lies in `run_dir`; returns when it has completed.

    `sites`, `in_process` and `roster_of` are those of `Participants`; `on_round(round, loss)` follows each commit (loss
    None: the round was void).
    Raises RunError when too few sites answer; the last commit stays, and a later call goes on from it.
    """
    recipe = load_recipe(run_dir / "recipe.yaml")
    participants = Participants(sites, roster_of, in_process)
    return _RoundLoop(grid, RunFolder(run_dir), recipe, participants, on_round).run()


class _RoundLoop:
    def __init__(
        self,
        grid: Grid,
        folder: RunFolder,
        recipe: Recipe,
        participants: Participants,
        on_round: Callable[[int, float | None], None],
    ) -> None:
        self._folder = folder
        self._recipe = recipe
        self._topology = recipe.topology
        self._on_round = on_round
        self._of_all: Callable[[Iterable[float]], float] = sum if participants.in_process else max
        # An update may begin from a state that is so many rounds older than the newest.
        stale = 0 if recipe.topology.buffer is None else recipe.topology.most_stale + 1
        self._store = RunStore(folder, max(recipe.topology.keep_rounds, stale))
        committed = self._store.latest()
        self._goes_on = bool(committed)
        self._progress: Progress = committed[0] if committed else Progress()
        self._state: TrainableState | None = committed[1] if committed else None
        self._outer_step, self._memory = self._outer_step_of(committed)
        self._exchange = OrderExchange(grid, folder, recipe.topology.round_deadline, self._progress)
        self._membership = Membership(grid, folder, recipe, self._exchange, participants, goes_on=self._goes_on)
        clear = ClearRounds(recipe, self._membership.announced)
        self._rounds: Rounds = clear
        grouping: Grouping = ClearGroups(recipe, self._membership.announced)
        documents = None
        if recipe.privacy.secure:
            documents = MaskExchange(
                folder,
                recipe,
                self._exchange,
                self._progress,
                lambda: participants.roster_of(self._membership.roster_digest),
            )
            self._rounds = SecureRounds(folder, recipe, documents, self._progress)
            grouping = SecureGroups(folder, recipe, documents)
        if recipe.tries_groups:
            self._rounds = GroupRounds(folder, recipe, self._exchange, grouping)
        self._buffer = self._buffered(clear, documents) if self._topology.buffer is not None else None
        self._rounds = self._buffer or self._rounds
        self._wider: Scale | None = None
        self._failed: set[str] = set()
        """The sites that an attempt at the present round asked in vain."""

    def _outer_step_of(self, committed: tuple[Progress, TrainableState] | None) -> tuple[OuterStep | None, Memory]:
        """The recipe's outer step, if it has one, and what it or the rule remembered at the last commit."""
        step, names = outer_step_of(self._recipe), None
        if step is not None:
            names = step.remembers
        elif not self._recipe.aggregation.rule_part.remembers:
            return None, {}
        if committed is None or not committed[0].counted:
            return step, {}
        return step, self._store.memory(committed[0].round, names, committed[1].manifest)

    def _buffered(self, clear: ClearRounds, documents: MaskExchange | None) -> AsynchronousRounds:
        """Asynchronous rounds: of updates that are seen one by one, or of cohorts' sums."""

        def initial(present: Mapping[int, str]) -> TrainableState:
            return self._fetch_initial_state(self._progress.round + 1, present)

        given = (self._folder, self._recipe, self._exchange, self._progress, self._store, initial)
        if self._recipe.privacy.ring_bits is None:
            return BufferedRounds(*given, self._membership.announced, self._order_of)
        return CohortRounds(*given, clear, documents, lambda: self._membership.terms)

    @property
    def _minimum(self) -> int:
        return self._topology.fewest_sites

    def run(self) -> Summary:
        with reporting(self._recipe, self._folder, self._progress.round):
            return self._run()

    def _run(self) -> Summary:
        self._folder.forget_failure()
        if self._goes_on:
            self._folder.event(events.ResumedAtRound(round=self._progress.round, rounds_done=self._progress.counted))
        else:
            self._folder.event(events.FederatedStarted(rounds=self._topology.rounds))
        began = time.perf_counter() - self._progress.seconds_total
        rounds = self._topology.rounds or 0
        while self._progress.counted < rounds and not self._should_stop_early():
            self._check_void_rounds()
            number, loss = self._progress.round + 1, None
            self._failed.clear()
            try:
                loss = self._take_in(number, *self._until_enough(f"round {number}", number, self._attempt))
            except RoundVoid as void:
                self._rounds.renew()
                self._progress.record_void(number)
                self._progress.scale = self._wider or self._progress.scale
                self._folder.event(events.RoundVoid(round=number, reason=str(void)))
            self._progress.seconds_total = time.perf_counter() - began
            if self._buffer is not None:
                self._buffer.note()
            assert self._state is not None, "a round that is void changes a state that is there"
            self._state = self._store.commit(self._progress, self._state, self._memory)
            self._memory = self._store.memory(number, self._memory, self._state.manifest)
            prune_best(self._folder.checkpoints, self._progress.best_at)
            if self._progress.void_in_a_row and self._progress.void_in_a_row % MOST_VOID_IN_A_ROW == 0:
                self._check_void_rounds()
                said = f"{MOST_VOID_IN_A_ROW} rounds in a row were void; the run can go on after round {number}"
                raise self._void_rounds(said)
            self._on_round(number, loss)
        return self._finish(began)

    def _check_void_rounds(self) -> None:
        """Raise VoidRoundsError when the run has had as many void rounds as it may."""
        if self._progress.void_rounds >= (most := self._recipe.most_void_rounds):
            raise self._void_rounds(f"{most} rounds were void, the most that this run may have")

    def _void_rounds(self, said: str) -> VoidRoundsError:
        """The error of a run that ends for void rounds, noted in its summary."""
        progress, reasons = self._progress, self._exchange.recent_reasons()
        error = VoidRoundsError(f"{said}: {reasons}", progress.counted, progress.void_rounds)
        self._folder.write_summary(summary_of_void_rounds(self._recipe, error))
        return error

    def _take_in(self, number: int, outcome: Outcome, seconds: float) -> float | None:
        """Make an outcome the run's; returns the round's training loss, where sites tell theirs."""
        start, after = self._state, outcome.state
        if self._outer_step is not None:
            assert start is not None, "an attempt begins with it"
            step = self._step_of_round(number, self._outer_step, outcome)
            after, self._memory = take_step(step, start, after, self._memory)
        elif outcome.memory is not None:
            self._memory = outcome.memory
        self._state, self._progress.scale = remade(self._recipe, after), self._wider or outcome.scale
        self._folder.event(self._progress.record_round(number, outcome.report, seconds, self._of_all))
        # The evaluation was of the state that the round began with; the initial one can be had of any site.
        is_best = self._progress.best_at == number - 1
        if is_best and start is not None and self._recipe.training.load_best_model_at_end:
            keep_best(self._folder.checkpoints, number - 1, start, {})
        return outcome.report.loss

    def _step_of_round(self, number: int, step: OuterStep, outcome: Outcome) -> OuterStep:
        """The outer step as it is in this round."""
        if self._recipe.aggregation.counts_rounds:
            return cast("CountingStep", step).of_sites(len(outcome.report.sites), len(self._progress.sites))
        if not self._recipe.aggregation.outer.step_part.reads_norms:
            return step
        assert self._state is not None, "an attempt begins with it"
        assert outcome.mean_square is not None, "the recipe was checked"
        scaled = cast("ScaledStep", step).in_round(outcome.mean_square, change_norm(outcome.state, self._state) ** 2)
        self._folder.event(events.OuterRate(round=number, rate=scaled.rate))
        return scaled

    def _attempt(self, number: int, present: dict[int, str]) -> tuple[Outcome, float]:
        """One attempt at a round: what came of it, and the seconds it took. Raises TooFewSites, and RoundVoid."""
        began = time.perf_counter()
        aggregation = self._begin(number, present)
        if self._topology.asked_beyond or self._topology.buffer is not None:
            aggregation.wanted = wanted_sites(self._recipe, len(present))
        self._exchange.too_narrow = False
        replies = self._exchange.ask(
            self._with_taken_in(aggregation.orders(), aggregation.asked.values()),
            aggregation.asked,
            aggregation.reply,
            number,
            payload=self._state.to_bytes() if number > 1 and self._state is not None else b"",
            awaited=aggregation.awaited,
            enough=lambda: aggregation.is_full,
        )
        self._failed |= set(aggregation.asked.values())  # until its update is taken in
        for site, update in replies:
            with self._exchange.quarantine(site, number):
                aggregation.take(site, update)
                self._failed.discard(site)
            del update  # its payload, before the next ones are fetched
        if self._topology.asked_beyond and aggregation.is_full:
            spare = sorted(set(aggregation.asked.values()) - set(aggregation.sites))
            self._folder.event(events.NotAwaited(round=number, sites=spare))
        if self._exchange.too_narrow and self._progress.scale is not None:
            self._wider = widened(self._progress.scale, self._recipe, self._membership.terms.manifest)
        try:
            outcome = aggregation.outcome(self._recipe.needed_sites)
            return outcome, time.perf_counter() - began
        except ProtocolError as error:
            if aggregation.repeatable:
                raise TooFewSites(aggregation.sites, str(error)) from None
            raise RoundVoid(str(error)) from None

    def _with_taken_in(
        self, orders: Message | Mapping[str, Message], sites: Iterable[str]
    ) -> Message | Mapping[str, Message]:
        """The orders, which tell each site its last round that counted where it has to know."""
        if not (self._recipe.aggregation.counts_rounds or keeps_own(self._recipe)):
            return orders
        last = self._progress.taken_in
        return {
            site: (orders if isinstance(orders, Message) else orders[site]).model_copy(
                update={"taken_in": last.get(site, 0)}
            )
            for site in sites
        }

    def _begin(self, number: int, present: dict[int, str]) -> RoundAggregation:
        """The round's aggregation, begun. Raises TooFewSites."""
        recipe = self._recipe
        if self._state is None:  # changes are measured from it, whatever the codec
            self._state = self._fetch_initial_state(number, present)
            remade(recipe, self._state)  # where adapters cannot be, it says so before anybody trains
        chosen = set(drawn(recipe, number, present.values(), self._failed))
        asked = {node: site for node, site in present.items() if site in chosen}
        try:
            cohort = self._rounds.cohort(number, asked, present)
        except ProtocolError as error:
            self._failed |= chosen
            raise TooFewSites((), f"secure aggregation cannot be set up: {error}") from None
        ring, terms = None, self._membership.terms
        if recipe.privacy.ring_bits is not None:
            scale = self._wider or self._progress.scale or first_scale(recipe, terms.manifest)
            self._progress.scale, self._wider = scale, None
            ring = RingTerms(scale=scale, sites=cohort.room)
        return self._rounds.begin(self._order_of(number, ring), cohort, terms, self._state, self._memory)

    def _order_of(self, number: int, ring: RingTerms | None = None) -> TrainOrder:
        first, every = self._progress.counted == 0, self._topology.eval_every
        return TrainOrder(
            run_id=self._folder.run_id,
            round=number,
            steps=self._topology.most_local_steps,
            evaluate=self._recipe.tries_groups or first or (number - 1) % every == 0,
            manifest_digest=self._membership.terms.manifest.digest,
            void_rounds=self._progress.void_rounds,
            ring=ring,
        )

    def _fetch_initial_state(self, number: int, present: Mapping[int, str]) -> TrainableState:
        """The state that all sites begin with, from the first that sends it. Raises TooFewSites when none does.

        One is asked, and the others at once where it does not send it: so no more than two wait in vain.
        """
        order, terms = InitialStateOrder(run_id=self._folder.run_id), self._membership.terms
        first = dict(list(present.items())[:1])
        for asked in (first, {node: name for node, name in present.items() if node not in first}):
            for site, reply in self._exchange.ask(order, asked, InitialStateReply, number):
                with self._exchange.quarantine(site, number):
                    state = TrainableState.from_bytes(reply.payload, terms.manifest)
                    if state.digest != terms.initial_state_digest:
                        raise ProtocolError("it is not the initial state that the sites agreed on")
                    return state
        raise TooFewSites((), "no site sent the initial state")

    def _until_enough(self, what: str, number: int, attempt: Callable[[int, dict[int, str]], _Result]) -> _Result:
        """The result of `attempt` with the present sites; tried again while too few answer.

        Raises RunError when they are too few each time.
        """
        for count in range(1, ATTEMPTS_PER_ROUND + 1):
            try:
                return attempt(number, self._membership.gather(self._progress, self._state))
            except TooFewSites as few:
                self._folder.event(
                    events.AttemptVoid(round=number, attempt=count, sites=sorted(few.sites), reason=str(few))
                )
        raise RunError(
            f"{what}: fewer than {self._recipe.needed_sites} sites answered in {ATTEMPTS_PER_ROUND} attempts"
            f"{f' ({reasons})' if (reasons := self._exchange.recent_reasons()) else ''}; "
            f"round {self._progress.round} is committed, and the run can go on from it"
        )

    def _finish(self, began: float) -> Summary:
        """Have the result evaluated and kept by every site, and write the run folder's last files."""
        if self._progress.at_work:
            self._folder.event(events.NotAwaited(round=self._progress.round, sites=sorted(self._progress.at_work)))
        number, state = self._progress.round, self._choose_result()
        final = self._evaluation_of(state, final=True)
        self._progress.note_final(final)
        self._progress.seconds_total = time.perf_counter() - began
        if not self._recipe.training.load_best_model_at_end:
            self._folder.event(events.LastStateEvaluated(round=number, eval_loss=total(final).loss))
        layout = self._membership.layout
        write_result(state, layout, self._folder.path / result_folder(layout))
        summary = self._progress.conclude(self._recipe, state, final)
        self._folder.write_summary(summary)
        self._folder.event(events.RoundsCompleted(round=number, eval_loss=summary.eval_loss))
        return summary

    def _choose_result(self) -> TrainableState:
        """The last state, or the best that was evaluated, where the recipe asks for it."""
        progress, last = self._progress, self._state
        assert last is not None, "a round has been taken in"
        if not self._recipe.training.load_best_model_at_end:
            return last
        if not self._recipe.privacy.secure:  # a site would tell its loss of no second state
            last_loss = total(self._evaluation_of(last, final=False)).loss
            progress.evaluated(last_loss, progress.round)
            self._folder.event(events.LastStateEvaluated(round=progress.round, eval_loss=last_loss))
        if (best := progress.better_than(progress.round)) is None:
            return last
        number, loss = best
        self._folder.event(events.BestChosen(round=number, eval_loss=loss))
        if number == 0:
            return self._until_enough("the initial state", 0, self._fetch_initial_state)
        return read_best(self._folder.checkpoints, number, self._membership.terms.manifest)[0]

    def _evaluation_of(self, state: TrainableState, *, final: bool) -> dict[str, EvalReport]:
        """A state's evaluation by every site, which keeps the run's final one. Raises RunError for too few."""
        if final:
            self._membership.wait_for_all()
        return self._until_enough(
            "the final evaluation", self._progress.round, partial(self._evaluate, state, final=final)
        )

    def _evaluate(
        self, state: TrainableState, number: int, present: dict[int, str], *, final: bool
    ) -> dict[str, EvalReport]:
        order = EvaluateOrder(
            run_id=self._folder.run_id,
            round=number,
            final=final,
            manifest_digest=self._membership.terms.manifest.digest,
        )
        if not final and self._topology.judged_by:
            present = {node: site for node, site in present.items() if self._topology.judges(site)}
            if not present:  # the result is chosen of the states that were judged
                return {}
        accepted: dict[str, EvalReport] = {}
        told = self._with_taken_in(order, present.values())
        for site, reply in self._exchange.ask(told, present, EvaluateReply, number, payload=state.to_bytes()):
            with self._exchange.quarantine(site, number):
                check_belongs(reply, order)
                check_evaluation(self._recipe, reply.evaluation, self._membership.announced[site].data)
                accepted[site] = reply.evaluation
        least = self._minimum if final or not self._topology.judged_by else 1
        if len(accepted) < least:
            raise TooFewSites(accepted, f"{len(accepted)} evaluations, and it takes {least}")
        return accepted

    def _should_stop_early(self) -> bool:
        if not self._progress.has_lost_patience(self._topology.early_stopping_patience):
            return False
        self._folder.event(events.StoppedEarly(round=self._progress.round))
        return True
