"""The figures of a federated run: what each round adds to them, and the summary they make in the end.

They are part of every commit, so that a run that goes on after a kill counts on from where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from core_training.foundation.state import TrainableState
from core_training.foundation.trainable import NOTHING_EVALUATED, EvalReport
from core_training.recipe.schema import Recipe
from core_training.runs.events import Round
from core_training.runs.figures import ExchangeFigures
from core_training.runs.run_folder import SiteSummary, Summary
from strategies.figures import RoundFigures
from strategies.ring_scale import Scale


@dataclass(frozen=True)
class SiteRound:
    """One site's part in a round, as far as it is known: under secure aggregation its losses and weight are not.

    `seconds` are of training, `seconds_in_all` from the order's arrival to the answer.
    """

    seconds: float
    seconds_in_all: float
    resident_seconds: float
    masking_seconds: float = 0.0
    loss: float | None = None
    eval_loss: float | None = None
    weight: float | None = None
    stale: int | None = None
    """The rounds that had passed since its start; None where all parts of a round begin with it."""

    def to_json(self) -> dict[str, float | None]:
        stale = {} if self.stale is None else {"stale": self.stale}
        return {
            **stale,
            "loss": self.loss,
            "eval_loss": self.eval_loss,
            "weight": self.weight,
            "seconds": self.seconds,
            "resident_seconds": self.resident_seconds,
        }


@dataclass(frozen=True)
class RoundReport:
    """A round's figures: sums over the sites, each site's part, and the number of values cut at the clip."""

    figures: RoundFigures
    sites: Mapping[str, SiteRound]
    saturated: int | None = None

    @property
    def loss(self) -> float | None:
        """The mean training loss; None where the sites tell none."""
        return self.figures.mean(self.figures.loss_mean)


@dataclass
class Progress(ExchangeFigures):
    """Everything of a run but its state. `round` is the last committed one, `seconds_*` are wall time.

    `scale` is how the next round's numbers are to be read where the codec is a ring.
    """

    round: int = 0
    initial_digest: str | None = None
    eval_loss_initial: float | None = None
    void_in_a_row: int = 0
    scale: Scale | None = None
    seconds_exchange: float = 0.0
    sites: dict[str, SiteSummary] = field(default_factory=dict)
    at_work: dict[str, int] = field(default_factory=dict)
    """The sites that a round did not wait for, and the rounds that their orders are of (`topology.buffer`)."""
    taken_in: dict[str, int] = field(default_factory=dict)
    """The last round in whose mean each site's update is."""

    @property
    def counted(self) -> int:
        """The rounds so far that counted."""
        return self.round - self.void_rounds

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        sites = {name: SiteSummary(**site) for name, site in document["sites"].items()}
        scale = Scale.from_json(document["scale"]) if document["scale"] is not None else None
        return super().from_json({**document, "sites": sites, "scale": scale})

    def record_round(
        self, number: int, report: RoundReport, seconds: float, of_all: Callable[[Iterable[float]], float]
    ) -> Round:
        """Add a round's figures; returns what is told of it.

        `seconds` is the round's wall time; `of_all` makes one of the sites' times: their sum where they take turns,
        the longest where they work side by side.
        """
        figures, sites = report.figures, report.sites
        first = self.train_loss_first is None
        if first:
            self.train_loss_first = figures.mean(figures.loss_first)
        self.train_loss_last = figures.mean(figures.loss_last)
        if figures.eval_loss is not None:
            self.evaluated(figures.eval_loss, number - 1)  # it is of the state that the round began with
        for site, part in sites.items():
            self.taken_in[site] = number
            self.sites[site].rounds = (self.sites[site].rounds or 0) + 1
            if part.eval_loss is not None:
                self.sites[site].eval_loss = part.eval_loss
        if first:
            self.eval_loss_initial = figures.eval_loss
            for site, part in sites.items():
                self.sites[site].eval_loss_initial = part.eval_loss
        self.round = number
        self.void_in_a_row = 0
        self.tokens += figures.tokens
        self.note_saturated(report.saturated)
        self.seconds_training += of_all(part.seconds for part in sites.values())
        # Who began in an earlier round may have taken longer than this one.
        self.seconds_exchange += max(0.0, seconds - of_all(part.seconds_in_all for part in sites.values()))
        self.seconds_protection += of_all(part.masking_seconds for part in sites.values())
        return Round(
            round=number,
            loss=report.loss,
            eval_loss=figures.eval_loss,
            seconds=seconds,
            saturated=report.saturated,
            rounds_done=self.counted,
            sites={site: part.to_json() for site, part in sorted(sites.items())},
        )

    def record_void(self, number: int) -> None:
        """Record a round that changed nothing, tried no more."""
        self.round = number
        self.void_in_a_row += 1
        self.void_rounds += 1

    def note_final(self, evaluations: Mapping[str, EvalReport]) -> None:
        """Remember the sites' losses of the result; those of an earlier state go."""
        for name, site in self.sites.items():
            site.eval_loss = evaluations[name].loss if name in evaluations else None

    def conclude(self, recipe: Recipe, state: TrainableState, final: Mapping[str, EvalReport]) -> Summary:
        """The completed run's summary; `final` holds the sites' evaluations of its result."""
        return self.summary_of_rounds(
            recipe,
            self.counted,
            self.seconds_exchange,
            parameters=state.manifest.size,
            initial_digest=self.initial_digest,
            state_digest=state.digest,
            eval_loss_initial=self.eval_loss_initial,
            final=sum(final.values(), start=NOTHING_EVALUATED),
            sites=self.sites,
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "scale": self.scale.model_dump(mode="json") if self.scale is not None else None}
