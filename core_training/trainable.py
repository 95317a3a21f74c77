"""What every topology asks of training: the interface that the Engine has in process and the Worker across one.

A run is trained in slices. Between two slices its owner may read the trainable state, put another one in its place and
evaluate; optimizer, schedule, data order and random numbers go on by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field

from core_training.state import Manifest, TrainableState

# Bounds that hold for any honest site; a report that arrives in a message is checked against them.
Number = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**15)]


@dataclass(frozen=True)
class TrainReport:
    """One slice of training.

    `loss_first` is the loss of the slice's first batch before its step, `loss_last` that of its last one, `loss_mean`
    the mean over all the slice's loss tokens (natural logarithm, per token). `loss_tokens` counts the tokens that
    entered the loss; it is the weight of the resulting update.
    """

    steps: Count
    loss_first: Number
    loss_last: Number
    loss_mean: Number
    loss_tokens: Count
    seconds: Seconds


@dataclass(frozen=True)
class EvalReport:
    """Loss on held-out records: sums rather than means, so that reports of several sites add up.

    `loss_sum` is in nats over `tokens` loss tokens; `correct_tokens` were the model's first choice;
    `exact_matches` of `examples` would be reproduced word for word by greedy decoding.
    """

    loss_sum: Number
    tokens: Count
    correct_tokens: Count
    exact_matches: Count
    examples: Count

    @property
    def loss(self) -> float | None:
        """Mean loss per token; None where there is nothing to evaluate."""
        return self.loss_sum / self.tokens if self.tokens else None

    def __add__(self, other: EvalReport) -> EvalReport:
        return EvalReport(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


NOTHING_EVALUATED = EvalReport(0.0, 0, 0, 0, 0)


@dataclass(frozen=True)
class DataReport:
    """What became of the records: how many train and evaluate, how many were cut or had nothing to learn from."""

    train_examples: Count
    eval_examples: Count
    truncated: Count
    dropped: Count


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
        """SHA-256 (hex) over the base model's weights and the initial state: what all sites must start from."""
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

    def write_state(self, state: TrainableState) -> None: ...

    def train(self, steps: int, on_step: Callable[[int, int], None] | None = None) -> TrainReport:
        """Go on for `steps` optimizer steps, or fewer if `stop` is called; `on_step(step, total)` follows each.

        Raises RunError when the loss is no longer finite.
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

    def layout(self, base_name: str | None = None) -> dict[str, str]:
        """The small text files (name: content) that `save_model` puts beside the weights.

        `base_name` is what they call the base model, in place of where it lies on this machine.
        """
        ...

    def close(self) -> None: ...
