"""The steps of DP-SGD (Abadi et al. 2016): units drawn by chance, each one's gradient clipped, noise on their sum.

A unit is all that is hidden together: a record, or a patient's records. Its loss is the mean over its own loss units,
so what it can add does not go by its length. Knows nothing of optimizers, rounds or budgets.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from core_training.data.examples import Batch, Row
from core_training.engine.failures import nothing_trained
from core_training.engine.unit_gradients import LinearGradients, RowGradients, batch_row
from core_training.foundation.errors import InputError
from core_training.models.prepared_model import PreparedModel
from core_training.privacy.mechanism import RecordMechanism
from core_training.privacy.noise import SecretRandom
from core_training.recipe.schema import Recipe
from core_training.stages.base import BatchLoss, Stage

_log = logging.getLogger(__name__)

Sums = dict[Any, torch.Tensor]
"""The sum of the units' clipped gradients for each parameter that a step trains, in float32."""

_LIKE = 1e-3
"""The most by which the norms of units' gradients may differ between the two ways of getting at them."""


def check_private(recipe: Recipe) -> None:
    """Raise InputError for DeepSpeed, which may be a site's own choice (`site.yaml`) and not the recipe's."""
    if recipe.privacy.hides_units and recipe.deepspeed.used:
        raise InputError(
            "deepspeed: under privacy.differential_privacy each unit's gradient is needed by itself, which DeepSpeed "
            "does not give; train without one of them"
        )


class PrivateSteps:
    """The gradients of a run's steps, each as the mechanism makes it. `units` is the unit of each row, from 0 up."""

    def __init__(
        self,
        stage: Stage[Any],
        prepared: PreparedModel,
        rows: Sequence[Row],
        units: npt.NDArray[np.int64],
        mechanism: RecordMechanism,
    ) -> None:
        """Raises InputError where the noise cannot be computed; see `RecordMechanism`."""
        self._stage = stage
        self._prepared = prepared
        self._rows = rows
        self._sequences = len(rows[0][0].sequences) if len(rows) else 1
        order = np.argsort(units, kind="stable")
        self._rows_of = np.split(order, np.flatnonzero(np.diff(units[order])) + 1) if len(rows) else []
        """The rows of each unit that has any: to draw one that has none adds nothing."""
        self._rate, self._batch = mechanism.sampling_rate, mechanism.sampling_rate * mechanism.units
        self._clip = mechanism.terms.clip
        self._deviation = mechanism.noise_multiplier * self._clip
        self._trained = stage.base.trainable_parameters
        self._together = LinearGradients.of(stage.base.model, self._trained)
        """Gets at the gradients of a batch's units in one pass; None where it cannot, and each has one of its own."""
        self._is_checked = False
        self._has_told = False

    def leave_gradient(self) -> list[BatchLoss]:
        """Draw a batch and leave its noised gradient in the parameters; return the losses, which nobody may be told.

        The gradient is that of the mean over as many units as are drawn on average. An empty batch has noise alone.
        Raises RunError where no trained tensor has a part in the loss.
        """
        stage = self._stage
        stage.set_mode(self._prepared.model)
        sums = {p: torch.zeros_like(p, dtype=torch.float32) for p in self._trained.values() if p.requires_grad}
        drawn = [self._rows_of[unit] for unit in SecretRandom().drawn(len(self._rows_of), self._rate)]
        losses = self._add_single_rows([int(rows[0]) for rows in drawn if len(rows) == 1], sums)
        losses += [self._add_unit(self._parts_of(rows), sums) for rows in drawn if len(rows) > 1]
        noise = SecretRandom()
        for parameter, total in sums.items():
            values = torch.from_numpy(noise.normal(total.numel())).to(total.dtype).reshape(total.shape)
            total.add_(values.to(total.device), alpha=self._deviation)
            parameter.grad = total.div_(self._batch).to(parameter.dtype)
        return losses or [_nothing(self._prepared.device)]

    def _add_single_rows(self, rows: Sequence[int], sums: Sums) -> list[BatchLoss]:
        """Add the clipped gradients of units with one row each."""
        losses: list[BatchLoss] = []
        for batch in self._parts_of(rows) if len(rows) else []:
            together = self._together if self._is_checked or self._check(batch) else None
            if together is not None and (loss := self._add_together(together, batch, sums)) is not None:
                losses.append(loss)
                continue
            count = self._rows_in(batch)
            losses += [self._add_unit([batch_row(batch, row, count)], sums) for row in range(count)]
        return losses

    def _add_together(self, together: LinearGradients, batch: Batch, sums: Sums) -> BatchLoss | None:
        """Add each row's clipped gradient, out of one pass; None, with nothing added, where the rows are not apart."""
        loss, record, scale = self._gradients_together(together, batch)
        self._forget_gradients()
        if not record.are_apart:
            return None
        if not record.of:
            raise nothing_trained(self._stage.recipe)
        # Of each row's own mean loss, at most `clip` long.
        norms, lost = record.finite_norms()
        self._tell(lost)
        weights = (self._clip / (norms * scale).clamp(min=self._clip)) * scale
        for parameter, total in sums.items():
            record.add_weighted(weights, parameter, total)
        return loss

    def _gradients_together(
        self, together: LinearGradients, batch: Batch
    ) -> tuple[BatchLoss, RowGradients, torch.Tensor]:
        """The batch's loss, its rows' gradients of their sums, and what makes of each the gradient of its mean."""
        rows = self._rows_in(batch)
        with together.recorded(rows, self._sequences) as record:
            loss = self._stage.loss(self._prepared.model, batch)
            self._prepared.accelerator.backward(loss.total)
        units = torch.stack([self._stage.weight(batch_row(batch, row, rows)) for row in range(rows)])
        return _if_finite(loss.detached()), record, 1 / units.clamp(min=1).float()

    def _add_unit(self, parts: Sequence[Batch], sums: Sums) -> BatchLoss:
        """Add the clipped gradient of one unit, whose rows these are."""
        loss, norm, scale = self._leave_unit(parts)
        weight = self._clip / torch.clamp(norm * scale, min=self._clip) * scale
        # What is no number adds nothing: to fail by it would tell that the unit was drawn.
        is_number = bool(torch.isfinite(norm))
        self._tell(int(not is_number))
        for parameter, total in sums.items():
            if is_number and parameter.grad is not None:
                total.add_(parameter.grad * weight)
        self._forget_gradients()
        return loss

    def _leave_unit(self, parts: Sequence[Batch]) -> tuple[BatchLoss, torch.Tensor, torch.Tensor]:
        """Leave the gradient of a unit's sum in the parameters.

        Returns its loss, its norm, and what makes of it the gradient of the unit's mean.
        """
        losses = []
        for part in parts:
            loss = self._stage.loss(self._prepared.model, part)
            losses.append(loss.detached())
            self._prepared.accelerator.backward(loss.total)
        gradients = [p.grad for p in self._trained.values() if p.grad is not None]
        if not gradients:
            raise nothing_trained(self._stage.recipe)
        loss = reduce(add, losses)
        return _if_finite(loss), torch.nn.utils.get_total_norm(gradients).float(), 1 / loss.weight.clamp(min=1).float()

    def _check(self, batch: Batch) -> bool:
        """Give up on one pass for all rows where it does not give what a pass for each gives, as told by their norms.

        Layers may be given something else than the rows in their first dimension, which no shape tells. Returns whether
        the batch could tell: one row, or rows without a gradient, cannot, and have a pass each.
        """
        model, rows = self._prepared.model, self._rows_in(batch)
        if self._together is None or rows < 2:
            return False
        model.eval()  # without dropout, which draws anew in each pass
        try:
            _, record, scale = self._gradients_together(self._together, batch)
            self._forget_gradients()
            alone = []
            for row in range(rows):
                _, norm, own = self._leave_unit([batch_row(batch, row, rows)])
                alone.append(norm * own)
                self._forget_gradients()
        finally:
            model.train()
        expected = torch.stack(alone)
        if not bool(torch.isfinite(expected).all() and (expected > 0).all()):
            return False
        self._is_checked = True
        if not (record.are_apart and torch.allclose(record.norms() * scale, expected, rtol=_LIKE, atol=1e-7)):
            self._together = None
            _log.warning("each record has a pass of its own: this model does not keep the rows of a batch apart")
        return True

    def _parts_of(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> list[Batch]:
        """The rows as batches that are computed at once."""
        chosen = [self._rows[int(row)] for row in rows]
        size = self._stage.recipe.training.per_device_train_batch_size
        groups = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        return [self._prepared.placed(part) for group in groups for part in self._prepared.batches(group)]

    def _tell(self, lost: int) -> None:
        """Say once, here alone, that so many units' gradients are no numbers."""
        if lost and not self._has_told:
            self._has_told = True
            _log.warning(
                "the gradients of %d units are no numbers, and add nothing: is training.learning_rate too high?", lost
            )

    def _rows_in(self, batch: Batch) -> int:
        return len(batch["input_ids"]) // self._sequences

    def _forget_gradients(self) -> None:
        for parameter in self._trained.values():
            parameter.grad = None


def _if_finite(loss: BatchLoss) -> BatchLoss:
    """The loss without its figures, which an empty batch has none of; that of nothing where it is no number."""
    is_number = bool(torch.isfinite(loss.total))
    return BatchLoss(loss.total, loss.weight, loss.tokens) if is_number else _nothing(loss.total.device)


def _nothing(device: torch.device) -> BatchLoss:
    """The loss of a batch that nobody was drawn for."""
    none = torch.tensor(0, device=device)
    return BatchLoss(torch.tensor(0.0, device=device), none, none)
