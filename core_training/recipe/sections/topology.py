"""The section `topology`."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from core_training.parts.section import Name, PositiveInt, Rounds, Section

_FEW_LOCAL_STEPS = 5


PACES = ("local_steps", "local_epochs", "local_seconds")
"""The keys that say how far a site goes in a round."""


MOST_SECONDS = 10**5
"""Of a round: more than a day."""


class Topology(Section):
    """Who trains, and how the results meet."""

    kind: Literal["central", "federated", "gossip"] = Field("central", description="central | federated | gossip.")
    rounds: Rounds | None = Field(None, description="Exchanges.")
    local_steps: PositiveInt | None = Field(
        None,
        description="Optimizer steps at each site between two exchanges. Unset: 5 where there are rounds; few keep the "
        "sites together (docs/results.md).",
    )
    local_epochs: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        None,
        description="In place of `local_steps`: passes of each site over its own records between two exchanges, such "
        "as 0.2; rounded up to steps, one or more. A larger site takes more of them.",
    )
    local_seconds: Annotated[float, Field(gt=0, le=MOST_SECONDS)] | None = Field(
        None,
        description="In place of `local_steps`: seconds that each site trains between two exchanges, for one step or "
        "more. A faster site takes more of them, and no second run is the same.",
    )
    minimum_sites: PositiveInt | None = Field(
        None, description="Sites that must answer for a round to count. Unset: 1; among several gossip nodes 2."
    )
    sites: PositiveInt | None = Field(
        None,
        description="Sites that are expected to take part: a learning rate that is not given goes with their number "
        "(docs/stages.md). Unset: those admitted when the run is submitted, in the roster, or simulated.",
    )
    sites_per_round: PositiveInt | Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Federated: sites that take part in a round, a number or a share of those that are there, drawn "
        "anew each round from `training.seed` and the names. Unset: all.",
    )
    asked_beyond: Annotated[float, Field(ge=0, le=10)] = Field(
        0.0,
        description="The share of sites that are asked beyond `sites_per_round`: a round goes on as soon as so many "
        "have answered, without the slowest. Not under masks.",
    )
    buffer: PositiveInt | None = Field(
        None,
        description="Federated, asynchronous (FedBuff, Nguyen 2022): a round is of the first so many updates, and who "
        "has not answered works on from the state that it was given. A site is asked anew once it has answered and a "
        "round is over, so a fast one takes part more often. In a ring, masked or not, so many sites begin together, "
        "and a round is of the first such cohort's sum. Unset: a round waits for all that it asked.",
    )
    most_stale: Annotated[int, Field(ge=0, le=1000)] = Field(
        10,
        description="Of `buffer`: the most rounds that may have passed since an update's start; an older one is left "
        "out, with an event. The states of so many rounds stay on the server's disk.",
    )
    stale_power: Annotated[float, Field(ge=0, le=10)] = Field(
        0.5,
        description="Of `buffer`: an update that began s rounds ago counts (1 + s)^−p, and this is p; 0: all alike.",
    )
    round_deadline: Annotated[float, Field(gt=0)] = Field(
        3600.0, description="Seconds after which a round goes on without the sites that have not answered."
    )
    keep_rounds: Annotated[int, Field(ge=2)] = Field(
        2, description="A server's last committed rounds, to which `fedloom server rewind` can take the run back."
    )
    own_steps: PositiveInt | None = Field(
        None,
        description="Federated and gossip: steps that each site trains the finished model on, on its own records, in "
        "at most half of `round_deadline`, from where it is best there on the way from the run's start to it. The best "
        "that it comes to is its own model (`own/` in its run folder) where it is better on the site's held-out "
        "records than the common one, and never leaves it. Unset: none.",
    )
    own_learning_rate: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="The peak learning rate of `own_steps`. Unset: a quarter of `training.learning_rate` or, where "
        "that is unset too, of what one site by itself would get.",
    )
    own_proximal_mu: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Ditto (Li 2021): μ of the pull of `own_steps` towards the state that they begin with, the common "
        "one unless another is better at the site.",
    )
    eval_every: PositiveInt = Field(1, description="Rounds between two evaluations on the sites' held-out records.")
    judged_by: list[Name] = Field(
        default_factory=list,
        description="Federated: the sites on whose held-out records the state is evaluated after each round, which "
        "early stopping and the best state go by; say, those that hold a common test set (`data.eval`). The result is "
        "evaluated by all. Unset: all.",
    )
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Stop after this many evaluations without a lower held-out loss."
    )
    graph: Literal["complete", "ring", "exponential", "one_peer"] = Field(
        "complete",
        description="Who talks to whom under `mixing: metropolis`: all, the two beside one in the roster, or those 1, "
        "2, 4, 8, … places away, about 2·log₂ n of n nodes; `one_peer`: one of log₂ n in turn, another in each round.",
    )

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        given = [key for key in PACES if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: how far a round goes is said by {given[0]} already; give one of them")
        if self.rounds is not None and not given:
            self.__dict__.update(local_steps=_FEW_LOCAL_STEPS)
        if self.local_seconds is not None and self.local_seconds >= self.round_deadline:
            raise ValueError(
                f"local_seconds: a site that trains for {self.local_seconds:g} s has not answered by round_deadline, "
                f"{self.round_deadline:g} s; give fewer"
            )
        for key in ("own_learning_rate", "own_proximal_mu"):
            if getattr(self, key) and self.own_steps is None:
                raise ValueError(f"{key}: it is of the steps after the run, and there are none; give own_steps too")
        if self.asked_beyond and self.sites_per_round is None:
            raise ValueError("asked_beyond: a round that takes all sites has none beyond; give sites_per_round too")
        if self.buffer is not None and self.sites_per_round is not None:
            raise ValueError(
                "buffer: all sites work, and a round takes the first that answer; leave out it or sites_per_round"
            )
        return self

    @property
    def most_local_steps(self) -> int | None:
        """The steps of a round at each site, at most; None where they follow from a site's records (`local_epochs`).

        By `local_seconds` its milliseconds: the learning rate goes by them, and no step is taken in less.
        """
        return self.local_steps if self.local_seconds is None else math.ceil(1000 * self.local_seconds)

    @property
    def own_pace(self) -> str | None:
        """The key by which each site takes a number of steps of its own in a round; None where all take as many."""
        given = {"topology.local_epochs": self.local_epochs, "topology.local_seconds": self.local_seconds}
        return next((key for key, value in given.items() if value is not None), None)

    def in_round(self, sites: int) -> int:
        """How many of so many sites a round is of."""
        wanted = self.buffer if self.sites_per_round is None else self.sites_per_round
        if wanted is None:
            return sites
        return min(sites, wanted if isinstance(wanted, int) else math.ceil(wanted * sites))

    def judges(self, site: str) -> bool:
        """Whether a site evaluates the state after each round."""
        return not self.judged_by or site in self.judged_by

    @property
    def fewest_sites(self) -> int:
        """`minimum_sites`, or what stands for it where it is unset and there are as many."""
        return self.minimum_sites or (2 if self.kind == "gossip" else 1)
