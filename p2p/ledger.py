"""A node's account of a run: what it trained, evaluated and moved. It is committed with each epoch.

Pure; the run's summary is made from it at the end, for one node or for all the nodes of a simulation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from core_training.foundation.trainable import EVAL_REPORT, NOTHING_EVALUATED, DataReport, EvalReport
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import SiteSummary, Summary, peak_rss_bytes
from strategies.messages import Update


@dataclass
class Ledger:
    """Sums over the epochs so far. `eval_initial` and `eval_last` are of states that this node held.

    `saturated` values were cut at a ring's clip, of all updates in the sums that this node opened.
    """

    epochs: int = 0
    tokens: int = 0
    first_weight: int = 0
    last_weight: int = 0
    loss_first: float | None = None
    loss_last: float | None = None
    eval_initial: EvalReport | None = None
    eval_last: EvalReport | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    seconds_total: float = 0.0
    seconds_training: float = 0.0
    seconds_masking: float = 0.0
    saturated: int | None = None
    void_epochs: int = 0

    def trained(self, update: Update) -> None:
        """One epoch of local training, with the evaluation of the state that it started from, if there was one."""
        report = update.train
        self.epochs += 1
        self.tokens += report.tokens
        self.seconds_training += report.seconds
        if self.loss_first is None:
            self.loss_first, self.first_weight = report.loss_first, report.weight
        self.loss_last, self.last_weight = report.loss_last, report.weight
        if update.evaluation is not None:
            if update.round == 1:
                self.eval_initial = update.evaluation
            self.eval_last = update.evaluation

    def copy(self) -> Ledger:
        return replace(self)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Ledger:
        evaluations = {
            key: EVAL_REPORT.validate_python(document[key])
            for key in ("eval_initial", "eval_last")
            if document[key] is not None
        }
        return cls(**{**document, **evaluations})


@dataclass(frozen=True)
class NodeResult:
    """A node's final result."""

    name: str
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
    final = _pooled(ledger.eval_last for ledger in ledgers)
    total = sum(ledger.seconds_total for ledger in ledgers)
    training = sum(ledger.seconds_training for ledger in ledgers)
    digests = {result.state_digest for result in results}
    return Summary(
        topology="gossip",
        stage=recipe.stage,
        tuning=recipe.tuning.mode,
        status="completed",
        rounds=recipe.topology.rounds,
        trainable_parameters=results[0].parameters,
        initial_digest=results[0].initial_digest,
        state_digest=digests.pop() if len(digests) == 1 else None,
        train_loss_first=_mean((ledger.loss_first, ledger.first_weight) for ledger in ledgers),
        train_loss_last=_mean((ledger.loss_last, ledger.last_weight) for ledger in ledgers),
        eval_loss_initial=_pooled(ledger.eval_initial for ledger in ledgers).loss,
        eval_loss=final.loss,
        metrics=final.metrics,
        bytes_up=sum(ledger.bytes_up for ledger in ledgers),
        bytes_down=sum(ledger.bytes_down for ledger in ledgers),
        seconds={
            "total": total,
            "training": training,
            "exchange": max(0.0, total - training),
            **masking_seconds(recipe, results),
        },
        void_rounds=max(ledger.void_epochs for ledger in ledgers),
        saturated=max((ledger.saturated for ledger in ledgers if ledger.saturated is not None), default=None),
        tokens_trained=sum(ledger.tokens for ledger in ledgers),
        truncated=sum(result.data.truncated for result in results),
        dropped=sum(result.data.dropped for result in results),
        peak_rss_bytes=peak_rss_bytes(),
        sites={
            result.name: SiteSummary(
                train_examples=result.data.train_examples,
                eval_examples=result.data.eval_examples,
                eval_loss_initial=result.ledger.eval_initial.loss if result.ledger.eval_initial else None,
                eval_loss=result.ledger.eval_last.loss if result.ledger.eval_last else None,
                rounds=result.ledger.epochs,
                truncated=result.data.truncated,
                dropped=result.data.dropped,
            )
            for result in results
        },
    )


def masking_seconds(recipe: Recipe, results: Sequence[NodeResult]) -> dict[str, float]:
    """The time for masking at all nodes, for a summary's `seconds`; nothing where nothing is masked."""
    if recipe.privacy.secure is None:
        return {}
    return {"secure_aggregation": sum(result.ledger.seconds_masking for result in results)}


def _pooled(reports: Iterable[EvalReport | None]) -> EvalReport:
    return sum((report for report in reports if report is not None), start=NOTHING_EVALUATED)


def _mean(losses: Iterable[tuple[float | None, int]]) -> float | None:
    known = [(loss, tokens) for loss, tokens in losses if loss is not None]
    tokens = sum(count for _, count in known)
    return sum(loss * count for loss, count in known) / tokens if tokens else None
