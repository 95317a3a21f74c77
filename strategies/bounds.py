"""The most that one site's update of a round can be: by what it announced when it joined, by how far training goes.

A weight beyond it is an attempt to own the mean, and so is a change that no training makes. Pure.
"""

from __future__ import annotations

import math

import numpy as np

from core_training.foundation.errors import BeyondAnnouncedError, ProtocolError
from core_training.foundation.state import TrainableState
from core_training.foundation.trainable import DataReport, EvalReport, TrainReport
from core_training.recipe.pace import steps_of_a_round
from core_training.recipe.schema import Recipe
from strategies.draws import PIECE
from strategies.fedavg import most_weight, units_of_a_row
from strategies.ring_scale import largest_change, path_of_a_round

_BEYOND_TRAINING = 10_000.0
"""In learning rates a step, root mean square over all values: Adam moves a value by about 1, and by 16 at most."""

_ADAPTIVE_MOST = 16.0
"""In outer learning rates a round, with room to spare: as for Adam (`ring_scale`)."""

_MOST_NATS = 1e4
"""The loss of a token: a model that gives all alike has about 12, one that diverges hundreds."""

_MOST_LOSS = 1e8
"""The loss of a pair, an example or an answer: squared margins over small `beta`, rewards in any unit."""

_ROUNDING = 1e-3
"""So far below zero is what cannot be negative, where it is computed in few bits."""

_SEQUENCES_OF_A_ROW = 2
"""A pair has two."""


def most_rows(recipe: Recipe, records: int, processes: int) -> int:
    """The most rows that a site with so many records and processes learns from in one optimizer step."""
    training = recipe.training
    # Where an epoch ends with fewer rows than processes, those join the batch before.
    batches = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes + processes - 1
    # No step takes rows of two epochs. A group with fewer records than processes takes some twice.
    return min(batches, max(records, 2 * processes if processes > 1 else 0))


def most_steps(recipe: Recipe, ordered: int | None, data: DataReport, processes: int) -> int:
    """The most steps of a round at a site that announced such data and so many processes.

    `ordered` is the number that the round's order names, if it names one.
    """
    return ordered or steps_of_a_round(recipe, data.train_examples, processes)


def check_report(recipe: Recipe, steps: int, report: TrainReport, data: DataReport, processes: int) -> None:
    """Raise BeyondAnnouncedError for more weight or tokens than `steps` optimizer steps of a site can have.

    `data` and `processes` are what the site announced when it joined.
    """
    check_weight(recipe, steps, report.weight, data.train_examples, processes)
    rows = most_rows(recipe, data.train_examples, processes)
    part, settings, training = recipe.stage_part, recipe.stage_settings, recipe.training
    sequences = rows * steps * part.answers(settings) * part.passes(settings) * _SEQUENCES_OF_A_ROW
    if report.tokens > (most := sequences * (training.max_length + recipe.rollout.max_new_tokens)):
        announced = _announced(data.train_examples, processes)
        raise BeyondAnnouncedError(f"{report.tokens} tokens are more than {steps} steps can have, {most}: {announced}")


def check_weight(recipe: Recipe, steps: int, weight: float, records: int, processes: int) -> None:
    """Raise BeyondAnnouncedError for more weight than `steps` optimizer steps of a site can have.

    `records` and `processes` are what the site announced.
    """
    if weight > (most := most_weight(recipe, steps, most_rows(recipe, records, processes))):
        raise BeyondAnnouncedError(
            f"weight {weight} is more than {steps} steps can have, {most}: {_announced(records, processes)}"
        )


def _announced(records: int, processes: int) -> str:
    return f"it announced {records} records and {processes} process{'es' * (processes != 1)}"


def check_evaluation(recipe: Recipe, evaluation: EvalReport, data: DataReport) -> None:
    """Raise ProtocolError for an evaluation that no site can have made.

    It is over more than the held-out records that the site announced (BeyondAnnouncedError), or its loss is beyond what
    the stage can give: one such loss would decide which state is best, and when to stop.
    """
    most = data.eval_examples * units_of_a_row(recipe, recipe.training.max_length + recipe.rollout.max_new_tokens)
    if evaluation.examples > data.eval_examples or evaluation.weight > most:
        raise BeyondAnnouncedError(
            f"an evaluation of weight {evaluation.weight} over {evaluation.examples} records is more than the site can "
            f"have, {most}: it announced {data.eval_examples} held-out records"
        )
    part, weight = recipe.stage_part, evaluation.weight
    highest = highest_loss(recipe, weight)
    lowest = -highest if part.negative else -_ROUNDING * weight
    if not lowest <= evaluation.loss_sum <= highest:
        raise ProtocolError(
            f"an evaluation of loss {evaluation.loss_sum:.4g} over weight {weight} is beyond what stage {part.name} "
            f"can give: {lowest:.4g} to {highest:.4g}"
        )


def highest_loss(recipe: Recipe, weight: int) -> float:
    """The largest sum of losses over so many units that counts as one of the recipe's stage."""
    return (_MOST_NATS if recipe.stage_part.unit == "tokens" else _MOST_LOSS) * weight


def check_change(recipe: Recipe, steps: int, trained: TrainableState, start: TrainableState) -> float:
    """The L2 norm of a change. Raises ProtocolError for NaN, infinite values, and a norm beyond the largest.

    That is `aggregation.max_update_norm`; unset, what training can do in a round, by a wide margin.
    """
    norm, (most, key) = _finite_norm(trained, start), _most_change(recipe, steps, trained.manifest.size)
    if norm > most:
        raise ProtocolError(f"the change has norm {norm:.4g}, and {most:.4g} is the most ({key})")
    return norm


def check_distance(recipe: Recipe, rounds: int, state: TrainableState, initial: TrainableState) -> None:
    """Raise ProtocolError for NaN and infinite values, and a state further from the run's first than `rounds` can lead.

    A mean lies no further off than what it is of, so each round adds the most of one update. Not measured from the
    state that a node has of its own: two sides of a cut go apart for as long as it lasts.
    """
    size = state.manifest.size
    if recipe.privacy.ring_bits is not None:
        most, key = largest_change(recipe) * math.sqrt(size), "privacy.clip, or what the optimizer can do"
    else:
        most, key = _most_change(recipe, recipe.topology.most_local_steps or 1, size)
    most = _reach(recipe, most, size)
    if (norm := _finite_norm(state, initial)) > rounds * most:
        raise ProtocolError(
            f"it is {norm:.4g} from the run's first state; {rounds} rounds lead {rounds * most:.4g} at most ({key})"
        )


def _reach(recipe: Recipe, most: float, size: int) -> float:
    """How far a round can lead where no update is larger than `most`: an outer step goes on beyond the mean."""
    outer = recipe.aggregation.outer
    if outer.tau is not None:  # it moves each value by about its rate
        return most + _ADAPTIVE_MOST * outer.rate * math.sqrt(size)
    return most * max(outer.rate, 1.0) / (1 - (outer.momentum or 0.0))


def _most_change(recipe: Recipe, steps: int, size: int) -> tuple[float, str]:
    """The largest norm of one update of so many values, and the key that says so."""
    if (most := recipe.aggregation.max_update_norm) is not None:
        return most, "aggregation.max_update_norm"
    most = _BEYOND_TRAINING * path_of_a_round(recipe, steps) * math.sqrt(size)
    return most, "aggregation.max_update_norm unset: 10,000 learning rates a step"


def _finite_norm(trained: TrainableState, start: TrainableState) -> float:
    norm = change_norm(trained, start)
    if not math.isfinite(norm):
        raise ProtocolError("the state holds NaN or infinite values")
    return norm


def change_norm(trained: TrainableState, start: TrainableState) -> float:
    """The L2 norm of the difference of two states of one manifest, piece by piece in float64."""
    total = 0.0
    for first in range(0, trained.manifest.size, PIECE):
        piece = slice(first, first + PIECE)
        change = trained.buffer[piece].astype(np.float64) - start.buffer[piece]
        total += float(change @ change)
    return math.sqrt(total)
