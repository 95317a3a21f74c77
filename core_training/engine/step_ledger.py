"""The figures of a loop's steps: gathered where they arise, summed up when a point of the curve or a slice ends.

Until then they stay on the device, so that no step waits for them. Knows nothing of models or optimizers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from core_training.foundation.trainable import Figures, StepFigures, TrainReport, added, figures_of, means
from core_training.stages.base import BatchLoss


@dataclass
class TakenStep:
    """One step of the run: the losses of its batches, and the gradient's norm (a scalar) in each of its updates."""

    learning_rate: float
    losses: list[BatchLoss] = field(default_factory=list)
    grad_norms: list[torch.Tensor | None] = field(default_factory=list)


@dataclass
class _Sums:
    """Sums over the steps since the last point of the curve, over all processes."""

    loss: float = 0.0
    weight: int = 0
    tokens: int = 0
    seconds: float = 0.0
    grad_norms: float = 0.0
    updates: int = 0
    figures: Figures = field(default_factory=dict)


class StepLedger:
    """The steps of a run in one process. `total` sums a tensor over all processes of a group, which all must ask it."""

    def __init__(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._total = total
        self.steps = 0
        """Steps of the last slice."""
        self._learning_rate = 0.0
        self._losses: list[BatchLoss] = []
        self._grad_norms: list[torch.Tensor] = []
        self._names: list[str] = []
        self._tables: list[torch.Tensor] = []
        self._since_point = _Sums()
        self._began = 0.0

    def begin_slice(self) -> None:
        """Begin to count a slice; the sums since the last point of the curve go on."""
        self.steps = 0
        self._losses, self._grad_norms, self._tables = [], [], []
        self._began = time.perf_counter()

    def add(self, step: TakenStep) -> None:
        """Add a step that was taken whole."""
        self.steps += 1
        self._learning_rate = step.learning_rate
        self._losses += step.losses
        self._grad_norms += [norm for norm in step.grad_norms if norm is not None]

    def figures(self, step: int) -> StepFigures:
        """The curve's point at `step`, which the next one begins after. Every process of a group must call it."""
        self._sum_up()
        sums, self._since_point = self._since_point, _Sums()
        return StepFigures(
            step=step,
            loss=sums.loss / max(sums.weight, 1),
            weight=sums.weight,
            tokens=sums.tokens,
            seconds=sums.seconds,
            learning_rate=self._learning_rate,
            grad_norm=sums.grad_norms / sums.updates if sums.updates else None,
            figures=means(sums.figures),
        )

    def report(self, seconds: float) -> TrainReport:
        """The slice's report; it took so many seconds. Every process of a group must call it."""
        self._sum_up()
        table = torch.cat(self._tables)
        self._tables = []
        per_batch = table[:, 0] / table[:, 1].clamp(min=1)
        sums = table.sum(dim=0).tolist()
        return TrainReport(
            steps=self.steps,
            loss_first=float(per_batch[0]),
            loss_last=float(per_batch[-1]),
            loss_mean=sums[0] / max(sums[1], 1),
            weight=int(sums[1]),
            tokens=int(sums[2]),
            seconds=seconds,
            figures=figures_of(self._names, sums[3:]),
        )

    def plain(self) -> dict[str, Any]:
        """What a checkpoint keeps: the sums since the last point of the curve, as plain numbers."""
        return asdict(self._since_point)

    def take_over(self, kept: Mapping[str, Any] | None) -> None:
        """Go on from what `plain` gave; an earlier version's checkpoint has none."""
        self._since_point = _Sums(**kept) if kept is not None else _Sums()

    def _sum_up(self) -> None:
        """Sum up over all processes what the device holds, and let go of it.

        A few numbers among them hold on to the memory that the activations took.
        """
        losses, norms = self._losses, self._grad_norms
        self._losses, self._grad_norms = [], []
        if losses:
            self._names = sorted(losses[0].figures)
            table = torch.stack([loss.sums() for loss in losses])  # shape (batches, 3 + 2 figures)
            table = self._total(table).cpu()
            self._tables.append(table)
            loss, weight, tokens, *figures = table.sum(dim=0).tolist()
            sums = self._since_point
            sums.loss, sums.weight, sums.tokens = sums.loss + loss, sums.weight + int(weight), sums.tokens + int(tokens)
            sums.figures = added(sums.figures, figures_of(self._names, figures))
        if norms:
            self._since_point.grad_norms += float(torch.stack(norms).sum())
            self._since_point.updates += len(norms)
        now = time.perf_counter()
        self._since_point.seconds += now - self._began
        self._began = now
