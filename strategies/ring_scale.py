"""The limits of a ring's values: those of each tensor and of the weight, and how both follow the run.

A limit is public, and so is all that it is made from: the recipe, and sums over the sites. A site need not believe it:
it sends nothing that a limit would cut in many places (`strategies.ring`). See docs/decisions/018.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from core_training.foundation.bounded_reading import place_and_words
from core_training.foundation.errors import InputError, ProtocolError
from core_training.foundation.state import Manifest
from core_training.privacy.mechanism import SiteMechanism
from core_training.recipe.learning_rate import most_learning_rate, share_of_most, width_of
from core_training.recipe.optimisation import ADAMS
from core_training.recipe.schema import Recipe
from strategies.fedavg import MOST_PROCESSES
from strategies.weights import most_known_weight, most_weight_in_mean

MOST_HALVINGS = 40
LEVELS = 6
"""A site reports the level of its largest value: above its limit c, above c/2, c/4, c/8, c/16, or below."""

Levels = Sequence[Sequence[int]]
"""The number of sites on each level: a row of `LEVELS` counts for each tensor, and a last one for the weight."""

_TENSOR_LEVEL = 3
"""The level for a tensor's largest change: between c/8 and c/4, since the next round may bring a larger one."""
_WEIGHT_LEVEL = 2
"""The level for the largest weight: it varies less."""

_FAR_NOISE = 10.0
"""In standard deviations: noise beyond it, which is hardly ever drawn, might wrap round."""

_ADAM_FIRST = 4.0
_ADAM_MOST = 16.0
"""In learning rates a step. √((1 − β₁)²/((1 − β₂)(1 − β₁²/β₂))) = 7.3 is the most that Adam can move a value, whatever
its gradients; the rest is for weight decay."""

_SGD_FIRST = 16.0
"""A limit in root mean squares of a gradient that lies in one tensor alone."""
_SGD_MOST = 2.0
"""A limit in gradient norms: one value can have all of the gradient, and weight decay comes on top."""


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError(f"{value} is not a power of two")
    return value


class Scale(BaseModel):
    """The limits of one round, alike at all sites."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    exponents: list[Annotated[int, Field(ge=0, le=MOST_HALVINGS)]]
    """For each tensor, how often the largest change that the recipe allows is halved."""
    weight_cap: Annotated[int, Field(ge=1, le=2**48), AfterValidator(_power_of_two)]
    """The weight that is written with all bits; one above it counts as this."""

    @classmethod
    def from_json(cls, document: Any) -> Self:
        """Read what `model_dump` gave. Raises ProtocolError."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            place, said = place_and_words(error)
            raise ProtocolError(f"{'.'.join(filter(None, ('scale', place)))}: {said}") from None

    @classmethod
    def widest(cls, scales: Iterable[Scale]) -> Self:
        """The scale that cuts nothing which one of these does not cut. Raises ProtocolError for different lengths."""
        given = list(scales)
        try:
            exponents = [min(column) for column in zip(*(scale.exponents for scale in given), strict=True)]
        except ValueError:
            raise ProtocolError("the scales are of states with different numbers of tensors") from None
        return cls(exponents=exponents, weight_cap=max(scale.weight_cap for scale in given))


def level_of(value: float, limit: float) -> int | None:
    """The level on which a largest value lies; None for 0, which says nothing."""
    if value <= 0:
        return None
    # Bounded first: for a tiny value the quotient is infinite, to which frexp gives the exponent 0.
    return min(max(math.frexp(min(limit / value, 2.0**LEVELS))[1], 0), LEVELS - 1)


def largest_change(recipe: Recipe) -> float:
    """The most that one value may change in a round: `privacy.clip`, or what the optimizer can do at most.

    Raises InputError where nothing bounds the optimizer.
    """
    if recipe.privacy.clip is not None:
        return recipe.privacy.clip
    if (mechanism := SiteMechanism.of(recipe)) is not None:
        return largest_change_of(mechanism)
    training = recipe.training
    if _is_usual_adam(recipe):
        return _path(recipe) * _ADAM_MOST
    if training.optim != "sgd":
        raise InputError(
            f"privacy.clip: codec {recipe.privacy.codec} needs it with optim '{training.optim}', of which nothing says "
            "how far a value can move in a round; set it to some learning rates × topology.local_steps"
        )
    if training.max_grad_norm == 0:
        raise InputError(
            f"privacy.clip: codec {recipe.privacy.codec} needs it with optim 'sgd' and max_grad_norm 0, where nothing "
            "says how far a value can move in a round; set it, or training.max_grad_norm"
        )
    return _path(recipe) * _SGD_MOST * training.max_grad_norm


def largest_change_of(mechanism: SiteMechanism) -> float:
    """The same where sites are hidden: one value can have all of an update, and noise on it."""
    return mechanism.terms.clip * (1 + _FAR_NOISE * mechanism.share)


def most_weight_cap(recipe: Recipe) -> int:
    """The largest cap that a site's weight can call for."""
    return _next_power_of_two(most_weight_in_mean(recipe, recipe.topology.local_steps or 1))


def first_scale(recipe: Recipe, manifest: Manifest) -> Scale:
    """The scale of a run's first round, of which nothing is known but the recipe."""
    if recipe.privacy.hides_sites:  # one grid for all values, whose sum of squares is bounded
        return Scale(exponents=[0] * len(manifest.tensors), weight_cap=1)
    most = largest_change(recipe)
    # What the recipe alone allows is for the narrowest model; the tensors say how wide this one is.
    fitted = share_of_most(recipe, width_of(manifest))
    return Scale(
        exponents=[_halvings(most / (fitted * _first_limit(recipe, spec.size))) for spec in manifest.tensors],
        weight_cap=min(_next_power_of_two(_first_weight(recipe)), most_weight_cap(recipe)),
    )


def next_scale(scale: Scale, levels: Levels, recipe: Recipe) -> Scale:
    """The scale of the round after one whose sites were on these levels: the largest value among all sites decides.

    A limit grows to eight times, or shrinks to a quarter, in a round at most; where nobody reported anything it stays.
    """
    # Level 0 comes first: one site with a large value decides, since a narrower limit would cut its update.
    tops = [next((level for level, count in enumerate(row) if count), None) for row in levels]
    exponents = [
        # A level is a halving, so the distance from the wanted one is what the exponent lacks.
        exponent if top is None else min(max(exponent + top - _TENSOR_LEVEL, 0), MOST_HALVINGS)
        for exponent, top in zip(scale.exponents, tops[:-1], strict=True)
    ]
    shift = _WEIGHT_LEVEL - (_WEIGHT_LEVEL if tops[-1] is None else tops[-1])
    cap = max(scale.weight_cap << shift if shift > 0 else scale.weight_cap >> -shift, 1)
    # A site that always reports a weight above the cap must not raise it until all others' changes round to nothing.
    return Scale(exponents=exponents, weight_cap=min(cap, most_weight_cap(recipe)))


def widened(scale: Scale, recipe: Recipe, manifest: Manifest) -> Scale:
    """The scale after one that would have cut too much of some site's update; the same one when there is no wider.

    Such a site is in no sum, so sums do not report it: the first round's scale comes next, then the recipe's limits.
    """
    wider = Scale.widest([scale, first_scale(recipe, manifest)]).exponents
    if wider == scale.exponents:
        # The first scale was no wider: only the recipe's own limits are left to try.
        wider = [0] * len(wider)
    return scale.model_copy(update={"exponents": wider})


def _first_weight(recipe: Recipe) -> int:
    """The weight that a first round is written for: what is known of it, or a guess that is tighter than the cap."""
    if (known := most_known_weight(recipe)) is not None:
        return known
    # A group of the recipe's size, not the largest that a site may have.
    of_one = most_weight_in_mean(recipe, recipe.topology.local_steps or 1) // MOST_PROCESSES
    return max(of_one, 1) * recipe.deepspeed.processes


def _first_limit(recipe: Recipe, size: int) -> float:
    """The limit at which a first round cuts a tensor of `size` values."""
    if recipe.training.optim != "sgd":
        return _path(recipe) * _ADAM_FIRST
    # Clipped to this norm and spread evenly over the tensor, a gradient has norm/√size in each value.
    return _path(recipe) * _SGD_FIRST * (recipe.training.max_grad_norm or 1.0) / math.sqrt(max(size, 1))


def _is_usual_adam(recipe: Recipe) -> bool:
    """Whether the bound of Adam's steps holds, which is for its usual β."""
    training = recipe.training
    return training.optim in ADAMS and (training.adam_beta1, training.adam_beta2) == (0.9, 0.999)


def path_of_a_round(recipe: Recipe, steps: int) -> float:
    """Learning rate × updates of `steps` optimizer steps: the length of a path of unit steps one way."""
    updates = steps * recipe.stage_part.optimizer_steps(recipe.stage_settings)
    return (most_learning_rate(recipe) or 1.0) * updates  # at a rate of 0 nothing moves, and any limit will do


def _path(recipe: Recipe) -> float:
    return path_of_a_round(recipe, recipe.topology.local_steps or 1)


def _halvings(ratio: float) -> int:
    """The most halvings that leave a limit no lower than 1/`ratio` of itself."""
    # frexp's exponent is ⌊log₂ ratio⌋ + 1, exact where a logarithm may be rounded.
    return min(max(math.frexp(ratio)[1] - 1, 0), MOST_HALVINGS)


def _next_power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
