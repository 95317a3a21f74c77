"""A round's losses and counts as sums over the sites, in the clear or as whole numbers inside a masked vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from core_training.foundation.errors import ProtocolError
from core_training.foundation.trainable import EvalReport, TrainReport

COUNT = 8
"""Whole numbers that stand for the figures of a round."""

_FRACTION = 2.0**-16
_LARGEST = 2**48
"""Room for the sum of 2^15 sites in 64 bits."""


@dataclass(frozen=True)
class RoundFigures:
    """Sums over sites: of their losses times their weights, and of what their evaluations counted.

    The losses are those of `TrainReport`; the evaluation is of the state that the round began with.
    """

    weight: float = 0.0
    loss_first: float = 0.0
    loss_last: float = 0.0
    loss_mean: float = 0.0
    tokens: int = 0
    eval_loss_sum: float = 0.0
    eval_weight: int = 0
    eval_examples: int = 0

    @classmethod
    def of(cls, train: TrainReport, evaluation: EvalReport | None) -> RoundFigures:
        """One site's figures."""
        weight, tested = float(train.weight), evaluation or EvalReport(0.0, 0, 0)
        losses = (train.loss_first * weight, train.loss_last * weight, train.loss_mean * weight)
        return cls(weight, *losses, train.tokens, tested.loss_sum, tested.weight, tested.examples)

    def __add__(self, other: RoundFigures) -> RoundFigures:
        return RoundFigures(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def to_integers(self) -> list[int]:
        """The figures as whole numbers whose sums read back as sums: losses in steps of 2^-16.

        Raises ProtocolError for a loss that is not finite.
        """
        if not all(map(math.isfinite, astuple(self))):
            raise ProtocolError("a loss of this round is not a finite number")
        figures = [value if isinstance(value, int) else round(value / _FRACTION) for value in astuple(self)]
        return [max(-_LARGEST, min(figure, _LARGEST)) for figure in figures]

    @classmethod
    def from_integers(cls, integers: Sequence[int]) -> RoundFigures:
        """Read what `to_integers` wrote, or the sum of several. Raises ProtocolError for what no sites can have."""
        weight, first, last, mean, tokens, eval_loss, eval_weight, eval_examples = integers
        if min(weight, tokens, eval_weight, eval_examples) < 0:
            raise ProtocolError("the sum of the sites' figures is not one of weights and counts")
        return cls(
            weight=weight * _FRACTION,
            loss_first=first * _FRACTION,
            loss_last=last * _FRACTION,
            loss_mean=mean * _FRACTION,
            tokens=tokens,
            eval_loss_sum=eval_loss * _FRACTION,
            eval_weight=eval_weight,
            eval_examples=eval_examples,
        )

    def mean(self, loss_sum: float) -> float | None:
        """The mean over what entered the losses; None where sites tell none of them (differential privacy)."""
        return loss_sum / self.weight if self.weight else None

    @property
    def eval_loss(self) -> float | None:
        """The mean over what was evaluated; None where nothing was."""
        return self.eval_loss_sum / self.eval_weight if self.eval_weight else None
