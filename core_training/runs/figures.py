"""The figures of a run so far, in every topology: kept with each checkpoint, and summed up when the run ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from core_training.foundation.errors import VoidRoundsError
from core_training.foundation.trainable import EvalReport, TrainReport
from core_training.privacy.account import run_account
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import SiteSummary, Summary, peak_rss_bytes

_FORMER_NAMES = {
    "loss_first": "train_loss_first",
    "loss_last": "train_loss_last",
    "total_seconds": "seconds_total",
    "training_seconds": "seconds_training",
    "seconds_masking": "seconds_protection",
    "epochs": "rounds",
    "void_epochs": "void_rounds",
}
"""Names in the checkpoints of earlier versions."""


@dataclass
class RunFigures:
    """`tokens` entered the losses, which are means per unit of the stage; seconds are wall time.

    `best_at` is the step or round at whose end the state stood that had the lowest held-out loss so far; since then
    there were `evaluations_without_gain`. `evaluated_at` is that of the newest evaluation.
    """

    tokens: int = 0
    train_loss_first: float | None = None
    train_loss_last: float | None = None
    seconds_total: float = 0.0
    seconds_training: float = 0.0
    best_eval_loss: float | None = None
    best_at: int | None = None
    evaluations_without_gain: int = 0
    evaluated_at: int | None = None

    def evaluated(self, loss: float | None, at: int) -> bool:
        """Add the held-out loss of the state at the end of step or round `at`; returns whether it is the lowest."""
        self.evaluated_at = at
        if loss is None:
            return False
        if self.best_eval_loss is not None and loss >= self.best_eval_loss:
            self.evaluations_without_gain += 1
            return False
        self.best_eval_loss, self.best_at, self.evaluations_without_gain = loss, at, 0
        return True

    def better_than(self, now: int) -> tuple[int, float] | None:
        """Step or round, and held-out loss, of the best state, where it is not the one at the end of `now`."""
        if self.best_at is None or self.best_eval_loss is None or self.best_at == now:
            return None
        return self.best_at, self.best_eval_loss

    def has_lost_patience(self, patience: int | None) -> bool:
        """Whether there were so many evaluations without a lower loss."""
        return patience is not None and self.evaluations_without_gain >= patience

    def trained(self, report: TrainReport) -> None:
        """Add a slice of training in this process; a report may withhold its losses."""
        if report.weight:
            self.train_loss_first = report.loss_first if self.train_loss_first is None else self.train_loss_first
            self.train_loss_last = report.loss_last
        self.tokens += report.tokens
        self.seconds_training += report.seconds

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Read what `to_json` made, also an earlier version's. Raises TypeError on anything else."""
        own = {one.name for one in fields(cls)}
        return cls(**{name if name in own else _FORMER_NAMES.get(name, name): one for name, one in document.items()})

    def summary(
        self,
        recipe: Recipe,
        *,
        parameters: int,
        initial_digest: str | None,
        state_digest: str | None,
        eval_loss_initial: float | None,
        final: EvalReport,
        sites: dict[str, SiteSummary],
        steps: Mapping[str, tuple[int, int]],
    ) -> Summary:
        """The completed run's summary; `final` is the evaluation of its result, `sites` have their records' counts.

        `steps` are each party's units and the optimizer steps that it took (see `core_training.privacy.account`).
        """
        privacy, epsilons = run_account(recipe, steps)
        for name, epsilon in epsilons.items():
            if name in sites:
                sites[name].epsilon = epsilon
        return Summary(
            topology=recipe.topology.kind,
            stage=recipe.stage,
            tuning=recipe.tuning.mode,
            status="completed",
            trainable_parameters=parameters,
            initial_digest=initial_digest,
            state_digest=state_digest,
            train_loss_first=self.train_loss_first,
            train_loss_last=self.train_loss_last,
            eval_loss_initial=eval_loss_initial,
            eval_loss=final.loss,
            metrics=final.metrics,
            seconds={"total": self.seconds_total, "training": self.seconds_training, "exchange": None},
            tokens_trained=self.tokens,
            truncated=sum(site.truncated or 0 for site in sites.values()),
            dropped=sum(site.dropped or 0 for site in sites.values()),
            privacy=privacy,
            peak_rss_bytes=peak_rss_bytes(),
            sites=dict(sorted(sites.items())),
        )


@dataclass
class ExchangeFigures(RunFigures):
    """The figures of a run whose parties exchange updates.

    `saturated` values were cut at a ring's clip (None: no ring); `seconds_protection` went into masks.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    void_rounds: int = 0
    saturated: int | None = None
    seconds_protection: float = 0.0

    def note_saturated(self, values: int | None) -> None:
        """Add the values cut in one sum; None says that there was no ring."""
        if values is not None:
            self.saturated = (self.saturated or 0) + values

    def summary_of_rounds(self, recipe: Recipe, rounds: int | None, exchange: float, **more: Any) -> Summary:
        """As `summary`, with what the exchanges add; `exchange` are their seconds.

        Void rounds were trained, too, at whoever was there: each site counts them all.
        """
        sites: dict[str, SiteSummary] = more["sites"]
        local_steps = recipe.topology.local_steps or 0
        steps = {
            name: (site.units or 0, ((site.rounds or 0) + self.void_rounds) * local_steps)
            for name, site in sites.items()
        }
        summary = self.summary(recipe, steps=steps, **more)
        summary.rounds, summary.void_rounds, summary.saturated = rounds, self.void_rounds, self.saturated
        summary.rounds_done = rounds
        summary.bytes_up, summary.bytes_down = self.bytes_up, self.bytes_down
        summary.seconds["exchange"] = exchange
        if recipe.privacy.secure:
            summary.seconds["secure_aggregation"] = self.seconds_protection
        return summary


def summary_of_void_rounds(recipe: Recipe, error: VoidRoundsError) -> Summary:
    """The summary of a run that ended before its time because its rounds were void: it has no result."""
    return Summary(
        topology=recipe.topology.kind,
        stage=recipe.stage,
        tuning=recipe.tuning.mode,
        status="failed",
        rounds=error.counted,
        rounds_done=error.counted,
        void_rounds=error.void_rounds,
    )
