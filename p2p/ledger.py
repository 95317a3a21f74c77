"""A node's account of a run: what it trained, evaluated and moved. It is committed with each round.

Pure; the run's summary is made from it at the end, for one node or for all the nodes of a simulation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from core_training.foundation.trainable import EVAL_REPORT, NOTHING_EVALUATED, DataReport, EvalReport
from core_training.recipe.schema import Recipe
from core_training.runs.figures import ExchangeFigures
from core_training.runs.run_folder import SiteSummary, Summary
from strategies.messages import Update


@dataclass
class Ledger(ExchangeFigures):
    """Sums over `rounds` so far. `eval_initial` and `eval_last` are of states that this node held, and the weights are
    what entered its first and its last loss.

    `saturated` counts all updates in the sums that this node opened. The node `agreed_to_stop` with all others of its
    last round. Its last `void_in_a_row` rounds were void.
    """

    rounds: int = 0
    first_weight: int = 0
    last_weight: int = 0
    eval_initial: EvalReport | None = None
    eval_last: EvalReport | None = None
    agreed_to_stop: bool = False
    void_in_a_row: int = 0

    def take(self, update: Update, *, is_first: bool) -> None:
        """Add a round that counted, with the evaluation of the state that it started from, if there was one.

        `is_first`: that state is the run's initial one.
        """
        self.rounds += 1
        self.void_in_a_row = 0
        if self.train_loss_first is None:
            self.first_weight = update.train.weight
        self.last_weight = update.train.weight
        self.trained(update.train)
        if update.evaluation is not None:
            if is_first:
                self.eval_initial = update.evaluation
            self.eval_last = update.evaluation

    def take_void(self) -> None:
        """Add a round that changed nothing."""
        self.void_rounds += 1
        self.void_in_a_row += 1

    def copy(self) -> Ledger:
        return replace(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        evaluations = {
            key: EVAL_REPORT.validate_python(document[key])
            for key in ("eval_initial", "eval_last")
            if document[key] is not None
        }
        return super().from_json({**document, **evaluations})


@dataclass(frozen=True)
class NodeResult:
    """A node's final result, after so many `rounds` of the run that counted; `last_round` is the number of the last."""

    name: str
    rounds: int
    last_round: int
    ledger: Ledger
    data: DataReport
    parameters: int
    initial_digest: str
    state_digest: str


def summarize(recipe: Recipe, results: Sequence[NodeResult]) -> Summary:
    """`summary.json` over these nodes: losses weighted by what entered them, traffic and times added up.

    Nodes that ended with different states (Metropolis mixing) have no common digest: None.
    """
    ledgers = [result.ledger for result in results]
    figures = ExchangeFigures(
        tokens=sum(ledger.tokens for ledger in ledgers),
        train_loss_first=_mean((ledger.train_loss_first, ledger.first_weight) for ledger in ledgers),
        train_loss_last=_mean((ledger.train_loss_last, ledger.last_weight) for ledger in ledgers),
        seconds_total=sum(ledger.seconds_total for ledger in ledgers),
        seconds_training=sum(ledger.seconds_training for ledger in ledgers),
        bytes_up=sum(ledger.bytes_up for ledger in ledgers),
        bytes_down=sum(ledger.bytes_down for ledger in ledgers),
        void_rounds=max(ledger.void_rounds for ledger in ledgers),
        saturated=max((ledger.saturated for ledger in ledgers if ledger.saturated is not None), default=None),
        seconds_protection=sum(ledger.seconds_protection for ledger in ledgers),
    )
    digests = {result.state_digest for result in results}
    return figures.summary_of_rounds(
        recipe,
        max(result.rounds for result in results),
        max(0.0, figures.seconds_total - figures.seconds_training),
        parameters=results[0].parameters,
        initial_digest=results[0].initial_digest,
        state_digest=digests.pop() if len(digests) == 1 else None,
        eval_loss_initial=_pooled(ledger.eval_initial for ledger in ledgers).loss,
        final=_pooled(ledger.eval_last for ledger in ledgers),
        sites={result.name: _site_summary(result) for result in results},
    )


def _site_summary(result: NodeResult) -> SiteSummary:
    return SiteSummary(
        train_examples=result.data.train_examples,
        eval_examples=result.data.eval_examples,
        eval_loss_initial=result.ledger.eval_initial.loss if result.ledger.eval_initial else None,
        eval_loss=result.ledger.eval_last.loss if result.ledger.eval_last else None,
        rounds=result.ledger.rounds,
        truncated=result.data.truncated,
        dropped=result.data.dropped,
        units=result.data.units or None,
    )


def _pooled(reports: Iterable[EvalReport | None]) -> EvalReport:
    return sum((report for report in reports if report is not None), start=NOTHING_EVALUATED)


def _mean(losses: Iterable[tuple[float | None, int]]) -> float | None:
    known = [(loss, tokens) for loss, tokens in losses if loss is not None]
    tokens = sum(count for _, count in known)
    return sum(loss * count for loss, count in known) / tokens if tokens else None
