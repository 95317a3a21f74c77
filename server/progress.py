"""The figures of a federated run: what each round adds to them, and the summary they make in the end.

They are part of every commit, so that a run that goes on after a kill counts on from where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from core_training.recipe import Recipe
from core_training.run_folder import SiteSummary, Summary, peak_rss_bytes
from core_training.state import TrainableState
from core_training.trainable import NOTHING_EVALUATED, EvalReport
from strategies.exchange import Update


@dataclass
class Progress:
    """Everything of a run but its state. `round` is the last committed one, `seconds_*` are wall time."""

    round: int = 0
    initial_digest: str | None = None
    train_loss_first: float | None = None
    train_loss_last: float | None = None
    eval_loss_initial: float | None = None
    best_eval_loss: float | None = None
    evaluations_without_gain: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    tokens: int = 0
    seconds_total: float = 0.0
    seconds_training: float = 0.0
    seconds_exchange: float = 0.0
    sites: dict[str, SiteSummary] = field(default_factory=dict)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Progress:
        """Read what `dataclasses.asdict` made. Raises TypeError on anything else."""
        sites = {name: SiteSummary(**site) for name, site in document["sites"].items()}
        return cls(**{**document, "sites": sites})

    def record_round(
        self, number: int, updates: Mapping[str, Update], seconds: float, of_all: Callable[[Iterable[float]], float]
    ) -> dict[str, Any]:
        """Add a round's figures; returns those for `events.jsonl`.

        `seconds` is the round's wall time; `of_all` makes one of the sites' times: their sum where they take turns,
        the longest where they work side by side.
        """
        weight = sum(update.weight for update in updates.values())

        def mean(loss: Callable[[Update], float]) -> float:
            return sum(loss(update) * update.weight for update in updates.values()) / weight

        if self.train_loss_first is None:
            self.train_loss_first = mean(lambda update: update.train.loss_first)
        self.train_loss_last = mean(lambda update: update.train.loss_last)
        evaluations = {site: update.evaluation for site, update in updates.items() if update.evaluation is not None}
        eval_loss = self.note_evaluations(evaluations, first=number == 1) if evaluations else None
        self.round = number
        self.tokens += sum(update.train.tokens for update in updates.values())
        self.seconds_training += of_all(update.train.seconds for update in updates.values())
        self.seconds_exchange += seconds - of_all(update.seconds for update in updates.values())
        for site in updates:
            self.sites[site].rounds = (self.sites[site].rounds or 0) + 1
        return {
            "round": number,
            "loss": mean(lambda update: update.train.loss_mean),
            "eval_loss": eval_loss,  # of the state the round began with
            "seconds": seconds,
            "sites": {
                site: {
                    "loss": update.train.loss_mean,
                    "eval_loss": update.evaluation.loss if update.evaluation else None,
                    "weight": update.weight,
                    "seconds": update.train.seconds,
                    "resident_seconds": update.resident_seconds,
                }
                for site, update in sorted(updates.items())
            },
        }

    def note_evaluations(self, evaluations: Mapping[str, EvalReport], first: bool = False) -> float | None:
        """Remember the sites' losses; returns the mean over all that they evaluated."""
        loss = sum(evaluations.values(), start=NOTHING_EVALUATED).loss
        for site, report in evaluations.items():
            self.sites[site].eval_loss = report.loss
            if first:
                self.sites[site].eval_loss_initial = report.loss
        if first:
            self.eval_loss_initial = loss
        if loss is None:
            return None
        if self.best_eval_loss is None or loss < self.best_eval_loss:
            self.best_eval_loss = loss
            self.evaluations_without_gain = 0
        else:
            self.evaluations_without_gain += 1
        return loss

    def summary(self, recipe: Recipe, state: TrainableState, final: Mapping[str, EvalReport]) -> Summary:
        """The completed run's summary; `final` holds the sites' evaluations of its result."""
        pooled = sum(final.values(), start=NOTHING_EVALUATED)
        return Summary(
            topology=recipe.topology.kind,
            stage=recipe.stage,
            tuning=recipe.tuning.mode,
            status="completed",
            rounds=self.round,
            trainable_parameters=state.manifest.size,
            initial_digest=self.initial_digest,
            state_digest=state.digest,
            train_loss_first=self.train_loss_first,
            train_loss_last=self.train_loss_last,
            eval_loss_initial=self.eval_loss_initial,
            eval_loss=pooled.loss,
            metrics=pooled.metrics,
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            seconds={
                "total": self.seconds_total,
                "training": self.seconds_training,
                "exchange": self.seconds_exchange,
            },
            tokens_trained=self.tokens,
            truncated=sum(site.truncated or 0 for site in self.sites.values()),
            dropped=sum(site.dropped or 0 for site in self.sites.values()),
            peak_rss_bytes=peak_rss_bytes(),
            sites=dict(sorted(self.sites.items())),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
