"""The interface of training that every topology uses: the Engine has it in process, the Worker across one.

A run is trained in slices. Between two slices its owner may read the trainable state, put another one in its place and
evaluate; optimizer, schedule, data order and random numbers go on by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field, TypeAdapter

from core_training.foundation.state import Manifest, TrainableState

# Bounds that hold for any honest site; a report that arrives in a message is checked against them.
# Sums over all sites of what is within them are numbers still.
Number = Annotated[float, Field(ge=-1e36, le=1e36, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**15)]


FigureName = Annotated[str, Field(max_length=40, pattern="^[a-z][a-z0-9_]*$")]
Figures = Annotated[dict[FigureName, tuple[Number, Count]], Field(max_length=24)]
"""A stage's figures besides its loss, by name: sum and count, so that figures of several sites add up."""


@dataclass(frozen=True)
class TrainReport:
    """One slice of training.

    `loss_first` is the loss of the slice's first batch before its step, `loss_last` that of its last one, `loss_mean`
    the mean over all the slice. `weight` counts the units that the loss is a mean over (tokens, pairs or examples, as
    the stage says), which is the update's weight unless the recipe says otherwise; `tokens` counts the tokens that
    entered the loss.
    """

    steps: Count
    loss_first: Number
    loss_last: Number
    loss_mean: Number
    weight: Count
    tokens: Count
    seconds: Seconds
    figures: Figures = field(default_factory=dict)

    @property
    def withheld(self) -> TrainReport:
        """The report without what the records decided: its weight is 0, and its losses are none."""
        return TrainReport(self.steps, 0.0, 0.0, 0.0, weight=0, tokens=0, seconds=self.seconds)


@dataclass(frozen=True)
class StepFigures:
    """A point of the curve of a run: the figures of the steps since the point before, the last of them `step`.

    `loss` is a mean over `weight` units and `figures` are the stage's own means; `tokens` entered the loss in `seconds`
    of training. `learning_rate` is that of the last step; `grad_norm` the mean norm of the gradients before they were
    clipped, over all optimizer updates (None: DeepSpeed keeps none in float32 without ZeRO).
    """

    step: int
    loss: float
    weight: int
    tokens: int
    seconds: float
    learning_rate: float
    grad_norm: float | None
    figures: Mapping[str, float] = field(default_factory=dict)


OnFigures = Callable[[StepFigures], None]
"""A function that is told the curve's points as training goes on."""


@dataclass(frozen=True)
class EvalReport:
    """Loss on held-out records: sums rather than means, so that reports of several sites add up.

    `loss_sum` is over `weight` units of the stage's loss (see TrainReport), which `examples` records held.
    """

    loss_sum: Number
    weight: Count
    examples: Count
    figures: Figures = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """Mean loss per unit; None where there is nothing to evaluate."""
        return self.loss_sum / self.weight if self.weight else None

    @property
    def metrics(self) -> dict[str, float]:
        """The figures as means."""
        return means(self.figures)

    def __add__(self, other: EvalReport) -> EvalReport:
        return EvalReport(
            self.loss_sum + other.loss_sum,
            self.weight + other.weight,
            self.examples + other.examples,
            added(self.figures, other.figures),
        )


def added(first: Figures, second: Figures) -> Figures:
    """The figures of two reports together."""
    both = dict(first)
    for name, (total, count) in second.items():
        before = both.get(name, (0.0, 0))
        both[name] = (before[0] + total, before[1] + count)
    return both


def figures_of(names: Sequence[str], values: Sequence[float]) -> Figures:
    """Sums and counts by name, from one after another."""
    return {name: (total, int(count)) for name, total, count in zip(names, values[::2], values[1::2], strict=True)}


def means(figures: Figures) -> dict[str, float]:
    """Figures as means; those of nothing are left out."""
    return {name: total / count for name, (total, count) in sorted(figures.items()) if count}


TRAIN_REPORT, EVAL_REPORT = TypeAdapter(TrainReport), TypeAdapter(EvalReport)
"""Read reports back from JSON, which knows lists and no tuples: `TRAIN_REPORT.validate_python(document)`."""

NOTHING_EVALUATED = EvalReport(0.0, 0, 0)


def total(reports: Mapping[str, EvalReport]) -> EvalReport:
    """The reports of several sources as one."""
    return sum(reports.values(), start=NOTHING_EVALUATED)


@dataclass(frozen=True)
class DataReport:
    """The counts of records: those that train and evaluate, those that were cut or had nothing to learn from.

    Under differential privacy, `units` are those that train and are hidden each (records, documents or patients).
    """

    train_examples: Count
    eval_examples: Count
    truncated: Count
    dropped: Count
    units: Count = 0


@dataclass(frozen=True)
class TrainedPart:
    """What of the state a slice of training may change; the rest takes part in each forward as it is.

    `frozen` are tensors that it may not; of those in `first`, (axis, n), only the first n rows along that axis.
    """

    frozen: frozenset[str] = frozenset()
    first: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether that is all of it."""
        return not self.frozen and not self.first


WHOLE = TrainedPart()


class Trainable(Protocol):
    """One model, one stage, one data set, held in memory and trained in slices."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def data_report(self) -> DataReport: ...

    @property
    def initial_state(self) -> TrainableState:
        """The state before the first step; the same at every site that starts from one base and seed."""
        ...

    @property
    def initial_digest(self) -> str:
        """SHA-256 (hex) over what all sites must start from: base model, initial state, a reward model that judges."""
        ...

    @property
    def training_sources(self) -> dict[str, int]:
        """Training examples by data source."""
        ...

    @property
    def step(self) -> int:
        """Optimizer steps done since the start of the run."""
        ...

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        ...

    def read_state(self) -> TrainableState: ...

    def write_state(self, state: TrainableState) -> None:
        """Put `state` in place of the trainable parameters."""
        ...

    def begin_round(
        self,
        state: TrainableState,
        *,
        missed_rounds: bool = False,
        left_out: bool = False,
        part: TrainedPart = WHOLE,
    ) -> None:
        """Put `state` in place too, and begin a round from it with the next slice of training.

        `missed_rounds`: there were rounds since the last slice that this site took no part in. `left_out`: what that
        slice led to entered no mean. `part`: what the round trains; under DeepSpeed all of it, as an engine lets no
        other recipe begin.
        """
        ...

    def skip(self, steps: int) -> None:
        """Pass over steps that this site did not take part in, so that its schedule is that of the others.

        Fewer than none go back over as many that it took and that led to nothing.
        """
        ...

    def train(
        self, steps: int, on_step: Callable[[int, int], None] | None = None, on_figures: OnFigures | None = None
    ) -> TrainReport:
        """Go on for `steps` optimizer steps, or fewer if `stop` is called; `on_step(step, total)` follows each.

        `on_figures` is told the figures after every `training.logging_steps` steps of the run, and after its last.

        Raises RunError for a step that fails, DivergedError among them when the loss is no longer finite.
        """
        ...

    def salvage(self) -> list[TrainReport] | None:
        """The reports of the steps before a failed `train`, if there were any; the state is theirs.

        None when the state is lost: then only `restore` and `reset` help.
        """
        ...

    def stop(self) -> None:
        """Let the running `train` return after its present step (safe to call from a signal handler)."""
        ...

    def evaluate(self) -> dict[str, EvalReport]:
        """Loss on the held-out records, by data source, without changing anything."""
        ...

    def checkpoint(self, folder: Path, notes: Mapping[str, Any] | None = None) -> None:
        """Write all that is needed to go on from here, and `notes`, into `folder`, whole or not at all."""
        ...

    def restore(self, folder: Path) -> dict[str, Any]:
        """Go back to what `checkpoint` wrote; returns its notes."""
        ...

    def reset(self) -> None:
        """Go back to the start of the run."""
        ...

    def save_model(self, folder: Path) -> None:
        """Write the result in the layout that PEFT or transformers loads."""
        ...

    def layout(self, base_name: str) -> dict[str, str]:
        """The small text files (name: content) that stand beside the trained tensors where others write the result.

        `base_name` is what they call the base model, in place of where it lies on this machine.
        """
        ...

    def alone(self, steps: int, learning_rate: float | None = None, pull: float = 0.0) -> Trainable:
        """Another one on the same model and data, to be trained by itself for so many steps: see `Recipe.alone`.

        `pull` is FedProx's μ, towards the state with which its training begins.
        They take turns on the model: each holds its own state. Not under DeepSpeed.
        """
        ...

    def close(self) -> None: ...


@contextmanager
def holding(trainable: Trainable, state: TrainableState) -> Iterator[TrainableState]:
    """Have `trainable` hold another state for a moment; yields the one that it holds before and after.

    After an error it goes on holding the other one: its process may be one of a group that is lost.
    """
    own = trainable.read_state()
    trainable.write_state(state)
    yield own
    trainable.write_state(own)
