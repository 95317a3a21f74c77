"""A node's judgement of its states by held-out records: which was the best, and when there is no more to gain.

Where updates travel as sums, the group's loss is in the sum, and all its members judge alike. Elsewhere a node knows
its own loss alone: it keeps the state that is best on its own records, and says with its update no more than that it
would stop. A run stops after a round to whose mean all contributors said so.
"""

from __future__ import annotations

from collections.abc import Iterable

from core_training.foundation.state import TrainableState
from core_training.runs import events
from core_training.runs.checkpoints import keep_best, prune_best, read_best
from core_training.runs.run_folder import RunFolder
from p2p.progress import Progress
from p2p.site_orders import SiteOrders


class Judgement:
    """One node's judgement in one run. What it comes to is in the ledger, and so in every commit."""

    def __init__(self, progress: Progress, folder: RunFolder) -> None:
        self._progress = progress
        self._folder = folder
        self._patience = progress.plan.recipe.topology.early_stopping_patience
        self._keeps_best = progress.plan.recipe.training.load_best_model_at_end

    def take(self, number: int, loss: float | None, start: TrainableState | None) -> None:
        """Take in the held-out loss of the state that round `number` began with, once, however often it is held."""
        if self._progress.ledger.evaluated_at == number - 1:
            return
        is_best = self._progress.ledger.evaluated(loss, number - 1)
        if is_best and self._keeps_best and start is not None:
            keep_best(self._folder.checkpoints, number - 1, start, {})

    @property
    def wants_to_stop(self) -> bool:
        return self._progress.ledger.has_lost_patience(self._patience)

    def agree(self, others: Iterable[bool]) -> None:
        """Note, before the round is committed, whether this node and all others of its mean want to stop."""
        self._progress.ledger.agreed_to_stop = self.wants_to_stop and all(others)

    def committed(self) -> None:
        """Drop the states that are the best no more, now that a commit says so."""
        prune_best(self._folder.checkpoints, self._progress.ledger.best_at)
        if self._progress.ledger.agreed_to_stop:
            self._progress.event(events.StoppedEarly(round=self._progress.last.round))

    def has_ended(self) -> bool:
        """Whether there is no round to come: by the plan, by agreement, or as all others have ended without this node.

        Those have agreed in a round that this node took no part in. One of them alone is not believed; nor does a node
        end that has no state yet, and will be given none.
        """
        progress, plan = self._progress, self._progress.plan
        if progress.ledger.agreed_to_stop:
            return True
        if progress.last.round >= plan.rounds and progress.last.counted >= plan.rounds:
            return True
        if self._patience is None or (progress.last.state is None and not plan.in_one_state):
            return False
        hellos = [hello for hello in progress.members.hellos() if hello.sender in plan.neighbours]
        return len(hellos) >= plan.believed and all(hello.finished for hello in hellos)

    async def result(self, site: SiteOrders) -> TrainableState:
        """The last state, or the best that was evaluated, where the recipe asks for it."""
        progress, last = self._progress, self._progress.last
        assert last.state is not None
        if not self._keeps_best:
            return last.state
        if not progress.plan.in_groups:  # a group's loss is known of the states that its rounds began with
            evaluation = await site.evaluate(last.state, last.round, final=False)
            progress.ledger.evaluated(evaluation.loss, last.round)
        if (best := progress.ledger.better_than(last.round)) is None:
            return last.state
        number, loss = best
        self._progress.event(events.BestChosen(round=number, eval_loss=loss))
        if number == 0:
            return progress.initial or await site.initial_state(progress.joined)
        return read_best(self._folder.checkpoints, number, progress.manifest)[0]
